"""METEOR in its first published form, with words and stems: as much of it as needs neither Java nor WordNet.

Papers on captions print METEOR 1.5, which also knows synonyms and weighs words by their kind, so these numbers may be
compared with each other, not with published ones.
Source: Banerjee and Lavie 2005, https://aclanthology.org/W05-0909.
"""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from eyespot.evaluation.scorers.captions import tokenized

# Beginnings of an alignment that are kept. Captions have tens; texts of a hundred words may have more, then the best.
MAX_PATHS = 100


@dataclass(frozen=True)
class MeteorScores:
    """In [0, 1]. meteor is that of the set, of counts summed over its captions; mean is the mean of the samples.

    samples: of each caption, in their order.
    """

    num_captions: int
    meteor: float
    mean: float
    samples: tuple[float, ...]


class Counts(NamedTuple):
    """Of a caption beside a reference, or their sums. chunks: the fewest runs of links that are runs on both sides."""

    matches: int
    chunks: int
    num_words: int
    num_reference_words: int

    @property
    def meteor(self) -> float:
        """Mean of precision and recall, where recall weighs nine times, less up to a half for words in other order.

        Source: Banerjee and Lavie 2005, section 2.2. "the president spoke to the audience" beside the same with "then"
        before "spoke":

        >>> round(Counts(matches=6, chunks=2, num_words=6, num_reference_words=7).meteor, 4)
        0.8535
        """
        if not self.matches:
            return 0.0
        precision, recall = self.matches / self.num_words, self.matches / self.num_reference_words
        mean = 10 * precision * recall / (recall + 9 * precision)
        return mean * (1 - 0.5 * (self.chunks / self.matches) ** 3)


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MeteorScores:
    """METEOR of captions as they were written; of several references the best one counts.

    Words of equal stem are linked. The paper links equal words first and then others of equal stem; that makes as many
    links, which may be other ones where a caption has two forms of a word.

    Args:
        predictions: one caption for each picture; an empty one scores 0.
        references: of each picture one caption or more.

    Raises:
        ValueError: no caption, numbers that differ, or a picture without references.
        ImportError: the stemmer is not installed.
    """
    said, given = tokenized(predictions, references)
    stem = _stemmer()
    best = []
    for words, texts in zip(said, given, strict=True):
        stems = [stem(word) for word in words]
        counts = (count(stems, [stem(word) for word in text]) for text in texts)
        best.append(max(counts, key=lambda one: one.meteor))
    samples = tuple(counts.meteor for counts in best)
    return MeteorScores(
        num_captions=len(best),
        meteor=Counts(*map(sum, zip(*best, strict=True))).meteor,
        mean=sum(samples) / len(samples),
        samples=samples,
    )


def count(stems: Sequence[str], reference: Sequence[str]) -> Counts:
    """The counts of an alignment."""
    links = align(stems, reference)
    chunks = sum(links.get(place - 1) != link - 1 for place, link in links.items())
    return Counts(len(links), chunks, len(stems), len(reference))


def align(stems: Sequence[str], reference: Sequence[str]) -> dict[int, int]:
    """Places of stems and of their partners in the reference: as many as there can be, with the fewest crossings.

    Two links cross if their words stand in one order here and in the other order there. Of alignments with equally few
    crossings, between which the paper does not choose, one with the fewest chunks is taken.

    The caption is walked from left to right. What the rest of it adds depends only on the places taken in the reference
    and on the link before it, so of all paths that agree in these the cheapest goes on.

    >>> align("the woman run on the bench".split(), "a girl run by the bench".split())
    {2: 2, 4: 4, 5: 5}
    """
    places: dict[str, list[int]] = {}
    for place, stem in enumerate(reference):
        places.setdefault(stem, []).append(place)
    coming = Counter(stems)
    sure = sum(1 << place for stem, those in places.items() if coming[stem] >= len(those) for place in those)
    paths = [_Path()]
    for stem in stems:
        longer: dict[tuple[int, int | None], _Path] = {}
        for path in paths:
            for partner in path.partners(places.get(stem, []), coming[stem]):
                new = path.extended(partner, sure)
                longer[new.state] = min(longer.get(new.state, new), new, key=_cost)
        coming[stem] -= 1
        paths = heapq.nsmallest(MAX_PATHS, longer.values(), key=_cost)
    return {place: link for place, link in enumerate(paths[0].links) if link is not None}


class _Path(NamedTuple):
    """An alignment of the first stems: the link of each, or None; taken has a bit for every place in the reference."""

    crossings: int = 0
    chunks: int = 0
    taken: int = 0
    links: tuple[int | None, ...] = ()

    @property
    def state(self) -> tuple[int, int | None]:
        return self.taken, self.links[-1]

    def partners(self, places: Sequence[int], num_coming: int) -> list[int | None]:
        """What the next stem may be linked to, if as many as possible of the equal ones that come shall have a partner.

        Equal stems take places in their order: where their links cross, exchanged partners cross less.
        """
        last = max((place for place in places if self.taken >> place & 1), default=-1)
        rest: list[int | None] = [place for place in places if place > last]
        num_links = min(num_coming, len(rest))
        nobody = [None] if num_links < num_coming else []
        return rest[: len(rest) - num_links + 1] + nobody

    def extended(self, link: int | None, sure: int) -> _Path:
        """By the link of the next stem. A place in sure will be taken, so a crossing with it counts before it is."""
        if link is None:
            return self._replace(links=(*self.links, None))
        bit = 1 << link
        passed = 0 if sure & bit else (self.taken >> link).bit_count()
        left_behind = (sure & ~self.taken & (bit - 1)).bit_count()
        begins = not self.links or self.links[-1] != link - 1
        crossings = self.crossings + passed + left_behind
        return _Path(crossings, self.chunks + begins, self.taken | bit, (*self.links, link))


def _cost(path: _Path) -> tuple[int, int]:
    return path.crossings, path.chunks


def _stemmer() -> Callable[[str], str]:
    """Porter's second for English, as in METEOR 1.5; his first, which the paper has, makes "on" of "one"."""
    try:
        from snowballstemmer import stemmer
    except ImportError as error:
        raise ImportError('METEOR needs a stemmer; pip install "eyespot[captions]"') from error
    return functools.cache(stemmer("english").stemWord)
