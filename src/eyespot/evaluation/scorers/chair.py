"""CHAIR: how many of the objects that a caption names are not in the picture.

Source: arXiv 1809.02156, section 2.1; https://github.com/LisaAnne/Hallucination.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from eyespot.data.wording import english
from eyespot.evaluation.scorers.columns import check_columns

Words = tuple[str, ...]


@dataclass(frozen=True)
class ChairScores:
    """Shares in [0, 1]; less is better, but for coverage.

    chair_i: share of all mentions, repeated ones too, of objects that are not there; 0 if nothing was mentioned.
    chair_s: share of captions with at least one such mention.
    coverage: share of the objects that are there which were mentioned. A caption that names nothing has CHAIR 0, so
        never read one without the other.
    hallucinated: of each caption the names of objects that are not there.
    """

    num_captions: int
    num_mentions: int
    chair_i: float
    chair_s: float
    coverage: float
    hallucinated: tuple[tuple[str, ...], ...]
    chair_i_samples: tuple[float, ...]
    chair_s_samples: tuple[float, ...]


class Vocabulary:
    """Names of objects, with all words that mean them, in singular and plural.

    Names and synonyms may have several words, and the longest that fits is taken: with "hot dog" in the vocabulary a
    hot dog is no dog. The official list treats "baby elephant" as an elephant, though a baby is a person; give it as a
    synonym of elephant. Plurals are made by English rules; one that could mean two names means neither.

    Args:
        names: of each object, with its synonyms; the name itself need not be repeated.
        others: phrases that mean no object though they hold the name of one, such as "home plate".

    Raises:
        ValueError: a text without a letter or digit, or with two meanings.
    """

    def __init__(self, names: Mapping[str, Iterable[str]], others: Iterable[str] = ()) -> None:
        given = [(text, name) for name, synonyms in names.items() for text in (name, *synonyms)]
        self._meanings: dict[Words, str | None] = {}
        for text, name in (*given, *((text, None) for text in others)):
            words = _words(text)
            known = self._meanings.setdefault(words, name)
            if not words:
                raise ValueError(f"the name {text!r} has no letter or digit; give words")
            if known != name:
                raise ValueError(f"{text!r} means both {known!r} and {name!r}; give it one meaning")
        self._meanings |= self._plurals(given)
        self._longest = max(map(len, self._meanings), default=0)

    def mentions(self, text: str) -> list[str]:
        """The names of all objects in a text, in order, repeated as often as they are mentioned.

        >>> Vocabulary({"dog": ["puppy"], "hot dog": []}).mentions("Two puppies and a dog eat hot dogs.")
        ['dog', 'dog', 'hot dog']
        """
        return [name for name in self._read(_words(text)) if name is not None]

    def name(self, text: str) -> str:
        """The object that a name, a synonym or a plural means.

        Raises:
            ValueError: none is known.
        """
        name = self._meanings.get(_words(text))
        if name is None:
            raise ValueError(f"{text!r} is the name of no object in the vocabulary; add it")
        return name

    def _plurals(self, given: Iterable[tuple[str, str]]) -> dict[Words, str]:
        """Of all texts; a plural that was given with a meaning keeps it."""
        meanings: dict[Words, set[str]] = {}
        for text, name in given:
            meanings.setdefault(_words(english(text).many), set()).add(name)
        return {
            words: names.pop() for words, names in meanings.items() if len(names) == 1 and words not in self._meanings
        }

    def _read(self, words: Words) -> Iterator[str | None]:
        start = 0
        while start < len(words):
            sizes = range(min(self._longest, len(words) - start), 0, -1)
            size = next((size for size in sizes if words[start : start + size] in self._meanings), 0)
            if size:
                yield self._meanings[words[start : start + size]]
            start += size or 1


def score(captions: Sequence[str], truths: Sequence[Collection[str]], vocabulary: Vocabulary) -> ChairScores:
    """What each caption mentions against what is in its picture.

    Args:
        captions: one for each picture.
        truths: the objects in each picture, by any word that the vocabulary knows. The paper takes the annotated
            objects and those that the reference captions mention (``Vocabulary.mentions``).
        vocabulary: the objects that are looked for; words for others are passed over.

    Raises:
        ValueError: no caption, numbers that differ, or a truth that the vocabulary does not know.
    """
    check_columns(captions=captions, truths=truths)
    num_mentions = num_there = num_covered = 0
    absent: list[list[str]] = []
    rates: list[float] = []
    for caption, truth in zip(captions, truths, strict=True):
        there = {vocabulary.name(text) for text in truth}
        mentioned = vocabulary.mentions(caption)
        absent.append([name for name in mentioned if name not in there])
        rates.append(_share(len(absent[-1]), len(mentioned)))
        num_mentions += len(mentioned)
        num_there += len(there)
        num_covered += len(there.intersection(mentioned))
    return ChairScores(
        num_captions=len(captions),
        num_mentions=num_mentions,
        chair_i=_share(sum(map(len, absent)), num_mentions),
        chair_s=sum(map(bool, absent)) / len(absent),
        coverage=_share(num_covered, num_there),
        hallucinated=tuple(tuple(dict.fromkeys(names)) for names in absent),
        chair_i_samples=tuple(rates),
        chair_s_samples=tuple(float(bool(names)) for names in absent),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _words(text: str) -> Words:
    return tuple(re.findall(r"[^\W_]+", text.casefold()))
