"""What is said about a picture, said about its mirror image: left and right change places.

A word that only may mean a side ("that is right", "he left", "le bras droit") makes the whole text uncertain; it is
then better not to mirror the picture than to teach a wrong word.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

_CONTEXT = 40  # characters before a word that are looked at


@dataclass(frozen=True)
class Sides:
    """Left and right in one language.

    Attributes:
        pairs: words for left and right that stand for each other; those of the first pair may have other meanings.
        stems: a word that begins so and is in no pair makes a text uncertain.
        uncertain: so does what this finds.
        before, between: where `before` is given, the first pair is certain only after it and with `between` following,
        after: or with this following, whatever stands before.
    """

    pairs: tuple[tuple[str, str], ...]
    stems: tuple[str, ...] = ()
    uncertain: str = r"(?!)"
    before: str = ""
    between: str = ""
    after: str = r"(?!)"


_ENGLISH_NOUNS = (
    "side|sides|hand|hands|handed|arm|arms|leg|legs|foot|feet|eye|eyes|ear|ears|knee|shoulder|wrist|elbow|paw|wing|"
    "shoe|sleeve|corner|edge|border|half|third|quarter|portion|lane"
)
SIDES = {
    "en": Sides(
        pairs=(
            ("left", "right"),
            ("leftmost", "rightmost"),
            ("lefthand", "righthand"),
            ("leftward", "rightward"),
            ("leftwards", "rightwards"),
            ("counterclockwise", "clockwise"),
        ),
        stems=("left", "right"),
        uncertain=r"\bright[\s-]side[\s-]up|\bright of way|\bright[\s-]hand man|\b(?:anti|counter-)-?clockwise",
        before=(
            r"\b(?:(?:to|on|at|from|in|towards?|the|his|her|its|their|my|your|our|\w+'s|far|top|bottom|upper|lower|"
            r"cent(?:er|re)|middle|front|rear|turn\w*|fac(?:e|es|ed|ing)|look\w*|point\w*|lean\w*|head(?:s|ed|ing)|"
            r"(?:left|right)\s+(?:or|and|to)(?:\s+the)?)[\s-]+)$"
        ),
        between=(
            r"\s*$|\s*[.,;:!?)\]\"]|\s+(?:is|are|was|were|has|have|can|and|or|but|in|with|while|who|that|which|there|near|"
            r"next to|behind|above|below|to (?:the )?(?:left|right)|\w{3,}ing)\b"
        ),
        after=rf"[\s-]+(?:of|most|{_ENGLISH_NOUNS}|(?:or|and|to)\s+(?:the\s+)?(?:left|right))\b",
    ),
    "de": Sides(
        pairs=(
            ("links", "rechts"),
            ("linke", "rechte"),
            ("linken", "rechten"),
            ("linker", "rechter"),
            ("linkes", "rechtes"),
            ("linkem", "rechtem"),
        ),
        stems=("links", "rechts"),
        uncertain=r"(?-i:\bRechten?\b)",
    ),
    "nl": Sides(
        pairs=(
            ("links", "rechts"),
            ("linksboven", "rechtsboven"),
            ("linksonder", "rechtsonder"),
            ("linkerkant", "rechterkant"),
            ("linkerzijde", "rechterzijde"),
            ("linkerhand", "rechterhand"),
        ),
        stems=("links", "rechts", "linker", "rechter"),
    ),
    "fr": Sides(
        pairs=(("gauche", "droite"),),
        stems=("gauch", "droit"),
        before=r"\b(?:à|la|sa|ma|ta|leur|notre|votre|main|partie|moitié)\s+$",
    ),
    "es": Sides(pairs=(("izquierda", "derecha"),), stems=("izquierd", "derech")),
    "it": Sides(pairs=(("sinistra", "destra"),), stems=("sinistr", "destr")),
    "pt": Sides(pairs=(("esquerda", "direita"),), stems=("esquerd", "direit")),
    "zh": Sides(pairs=(("左", "右"),), uncertain="左右|右左"),
    "ja": Sides(pairs=(("左", "右"),), uncertain="左右|右左"),
}


def check_languages(languages: Sequence[str]) -> None:
    """Raises ValueError unless each is a language whose words for left and right are known."""
    if unknown := [code for code in languages if code not in SIDES]:
        raise ValueError(f"language {unknown[0]!r} has no words for left and right here; choices: {', '.join(SIDES)}")


def mirrored(text: str, languages: Sequence[str] = ("en",)) -> str | None:
    """The text about the mirrored picture, or None where a word may mean no side; case is kept."""
    sides = [SIDES[code] for code in languages]
    if any(re.search(each.uncertain, text, re.IGNORECASE) for each in sides):
        return None
    words, others = _table(tuple(languages))
    pieces, end = [], 0
    for match in words.finditer(text):
        other = others.get(match.group().lower())
        if other is None or not all(_is_certain(text, match, each) for each in sides):
            return None
        pieces += [text[end : match.start()], _with_case_of(match.group(), other)]
        end = match.end()
    return "".join([*pieces, text[end:]])


@functools.cache
def _table(languages: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """What may be a word for a side, and the other side of each."""
    sides = [SIDES[code] for code in languages]
    others = {word: other for each in sides for pair in each.pairs for word, other in (pair, pair[::-1])}
    stems = [stem for each in sides for stem in each.stems]
    spaced = [word for each in sides if each.stems for pair in each.pairs for word in pair]
    unspaced = [word for each in sides if not each.stems for pair in each.pairs for word in pair]
    patterns = [rf"\b(?:(?:{'|'.join(spaced)})\b|(?:{'|'.join(stems)})\w*)"] if stems else []
    return re.compile("|".join(patterns + unspaced), re.IGNORECASE), others


def _is_certain(text: str, match: re.Match[str], sides: Sides) -> bool:
    word, rest = match.group(), text[match.end() :]
    if not sides.before or word.lower() not in sides.pairs[0] or re.match(sides.after, rest, re.IGNORECASE):
        return True
    if text.strip(" \n.!") == word:
        return True  # the whole answer
    start = max(0, match.start() - _CONTEXT)
    follows = re.search(sides.before, text[start : match.start()], re.IGNORECASE)
    return follows is not None and re.match(sides.between, rest, re.IGNORECASE) is not None


def _with_case_of(model: str, word: str) -> str:
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
