"""Multiple choice by text: which option does a free answer choose.

Source: arXiv 2403.20330 (MMStar), https://github.com/MMStar-Benchmark/MMStar.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from eyespot.evaluation.scorers.columns import check_columns

# A capital, or a small one where the clause ends, because "a" is an article.
_LETTER = r"(?P<letter>[A-Z](?!['\w])|[a-z](?= *(?:[).\]:,;*\"\n]|$)))"
_BARE = re.compile(r"\W*(?P<letter>[A-Za-z])\W*")
_STATED = re.compile(
    r"\b(?i:answer|option|choice|choose|select|pick)\s*(?i:is|would be|:)*[\s*:\"'(\[]*"
    r"(?i:(?:option|choice)\s+)?[(\[\"'*]*" + _LETTER
)
_LEADING = re.compile(
    r"\W*(?i:(?:option|choice)\s+)?(?:[(\[](?P<inside>[A-Za-z])[)\]]|(?P<letter>[A-Za-z])[).:\]](?!\w))"
    r"(?!\s*(?:and|or|/|,)\s*\W?[A-Z]\b)"
)
_ALONE = re.compile(r"(?<!['\w])(?:[B-HJ-Z](?!['\w])|[AI](?!['\w]|\s+(?!(?:and|or|is|because|since)\b)[a-z]))")
_ARTICLES = frozenset(("a", "an", "the"))


@dataclass(frozen=True)
class ChoiceScores:
    """Shares in [0, 1]; an unparsed answer is wrong.

    chance: accuracy of guessing among each question's options. samples: 1.0 for every right answer, 0.0 for others.
    """

    num_questions: int
    accuracy: float
    chance: float
    unparsed: int
    by_category: dict[str, float]
    samples: tuple[float, ...]


def read_choice(text: str, options: Sequence[str]) -> int | None:
    """The number of the option that an answer chooses, from 0; None if it chooses none, or more than one.

    Looked for in this order: the letter and nothing else ("(b)"); the letter after words like "the answer is", the last
    time they are there; the letter in front ("B. a dog", "Option B:"); an option's own words and nothing else; one
    letter alone ("I think B because"); one option's own words somewhere. The article "A" and the pronoun "I" are no
    letters. MMStar's own script knows the first three only.

    >>> [read_choice(text, ["a dog", "a cat"]) for text in ("B.", "The answer is (A)", "It is a cat", "A bird")]
    [1, 0, 1, None]
    """
    plain = text.replace("\u2019", "'").strip()
    letters = ascii_uppercase[: len(options)]
    for letter in _said(plain):
        if letter.upper() in letters:
            return letters.index(letter.upper())
    own = [number for number, option in enumerate(options) if _words(option) and _words(option) == _words(plain)]
    alone = set(letters).intersection(_ALONE.findall(plain))
    if not own and len(alone) == 1:
        return letters.index(alone.pop())
    own = own or _named(plain, options)
    return own[0] if len(own) == 1 else None


def read_as_published(text: str, options: Sequence[str]) -> int | None:
    """What MMStar's script reads: the letter at the very start, or after "(", "option " or "the answer is ".

    It takes the first letter of any word for one, so "Because" is B; for numbers to be compared with published ones.
    Source: https://github.com/MMStar-Benchmark/MMStar, eval/vlmeval/evaluate/mmstar.py.
    """
    plain = text.lower().strip().replace("\n", " ")
    letters = ascii_uppercase[: len(options)].lower()
    for start in ("", "(", "option ", "the answer is "):
        letter = plain.removeprefix(start)[:1]
        if plain.startswith(start) and letter and letter in letters:
            return letters.index(letter)
    return None


def score(
    predictions: Sequence[str],
    truths: Sequence[int],
    options: Sequence[Sequence[str]],
    categories: Sequence[str] | None = None,
    *,
    read: Callable[[str, Sequence[str]], int | None] = read_choice,
) -> ChoiceScores:
    """Every answer read and compared.

    Args:
        predictions: free text.
        truths: number of the right option, from 0.
        options: of each question, in the order of their letters.
        categories: of each question, for ``by_category``; the six of MMStar for instance.
        read: answer and options to the number of an option.

    Raises:
        ValueError: no question, numbers that differ, or a truth that is no option.
    """
    check_columns(predictions=predictions, truths=truths, options=options)
    categories = [""] * len(truths) if categories is None else categories
    check_columns(predictions=predictions, categories=categories)
    for number, (truth, texts) in enumerate(zip(truths, options, strict=True)):
        if not 0 <= truth < len(texts) <= len(ascii_uppercase):
            raise ValueError(f"question {number} has truth {truth} of {len(texts)} options; give a number from 0")
    chosen = [read(text, texts) for text, texts in zip(predictions, options, strict=True)]
    samples = [float(answer == truth) for answer, truth in zip(chosen, truths, strict=True)]
    groups: dict[str, list[float]] = {}
    for category, right in zip(categories, samples, strict=True):
        groups.setdefault(category, []).append(right)
    return ChoiceScores(
        num_questions=len(samples),
        accuracy=sum(samples) / len(samples),
        chance=sum(1 / len(texts) for texts in options) / len(samples),
        unparsed=chosen.count(None),
        by_category={name: sum(rights) / len(rights) for name, rights in groups.items() if name},
        samples=tuple(samples),
    )


def _said(text: str) -> Iterator[str]:
    """Letters that can only be an answer, the clearest first."""
    if bare := _BARE.fullmatch(text):
        yield bare["letter"]
    yield from [stated["letter"] for stated in _STATED.finditer(text)][-1:]
    if leading := _LEADING.match(text):
        yield leading["letter"] or leading["inside"]


def _named(text: str, options: Sequence[str]) -> list[int]:
    """Numbers of the options whose words stand in a text, but not only within the words of a longer option."""
    left = f" {' '.join(_words(text))} "
    found: list[int] = []
    lengths: dict[str, list[int]] = {}
    for number, option in enumerate(options):
        lengths.setdefault(" ".join(_words(option)), []).append(number)
    for words in sorted(filter(None, lengths), key=len, reverse=True):
        if f" {words} " in left:
            found += lengths[words]
            left = left.replace(f" {words} ", " | ")
    return found


def _words(text: str) -> list[str]:
    """Numbers and words without case and articles."""
    words = re.findall(r"-?\d+(?:[.,:]\d+)*|[^\W\d_]+", text.casefold())
    return [word for word in words if word not in _ARTICLES]
