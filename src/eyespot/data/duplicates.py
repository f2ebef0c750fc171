"""Near-duplicates found without comparing all pairs: hashes that differ in few bits, texts that share most pieces."""

from __future__ import annotations

import functools
import itertools
import random
import re
import unicodedata
import zlib
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
MAX_DISTANCE = 15
SHINGLE = 5
NUM_HASHES = 64
RECALL = 0.999


class HammingIndex:
    """Numbers of 64 bits, found again by numbers that differ from them in at most `max_distance` bits.

    Two such numbers are equal in one or more of max_distance + 1 bands, so only those that share a band are compared
    and none is missed.
    Source: Manku et al. 2007, https://doi.org/10.1145/1242572.1242592

    Raises:
        ValueError: max_distance below 0 or above 15, where bands become so short that nearly all pairs share one.
    """

    def __init__(self, max_distance: int) -> None:
        if not 0 <= max_distance <= MAX_DISTANCE:
            raise ValueError(f"max_distance is {max_distance}; give 0 to {MAX_DISTANCE} of the {HASH_BITS} bits")
        self.max_distance = max_distance
        self.numbers: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}
        ends = [HASH_BITS * i // (max_distance + 1) for i in range(max_distance + 2)]
        self._bands = [(low, (1 << high - low) - 1) for low, high in itertools.pairwise(ends)]

    def _keys(self, number: int) -> list[tuple[int, int]]:
        return [(band, number >> low & mask) for band, (low, mask) in enumerate(self._bands)]

    def add(self, number: int) -> None:
        for key in self._keys(number):
            self._places.setdefault(key, []).append(len(self.numbers))
        self.numbers.append(number)

    def near(self, number: int) -> list[tuple[int, int]]:
        """(distance, place) of every added number within the distance, the nearest first, then the earliest."""
        candidates = {place for key in self._keys(number) for place in self._places.get(key, ())}
        distances = ((((self.numbers[place] ^ number).bit_count()), place) for place in candidates)
        return sorted(found for found in distances if found[0] <= self.max_distance)


def normalized(text: str) -> str:
    """Words without case, punctuation and the forms of one letter (NFKC), one space between them."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def shingles(text: str) -> frozenset[str]:
    """All pieces of 5 letters of a normalised text; a shorter text is its only piece."""
    return frozenset(text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the pieces of two normalised texts, from 0 to 1."""
    first, second = shingles(a), shingles(b)
    return len(first & second) / len(first | second)


def banding(threshold: float) -> tuple[int, int]:
    """(bands, rows) of a MinHash signature: as many rows as still find similar texts with probability 0.999.

    Two texts of similarity s agree in all rows of one or more bands with probability 1 - (1 - s^rows)^bands.
    Source: Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4, http://www.mmds.org
    """
    for rows in range(NUM_HASHES, 1, -1):
        bands = NUM_HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return NUM_HASHES, 1


class TextIndex:
    """Texts, found again by texts of the same scope whose similarity is at least `threshold`.

    Texts that share a band of their MinHash signatures are compared exactly. So nothing is found that is not similar;
    what is similar is found with probability 0.999 or more, and equal texts always.

    Raises:
        ValueError: a threshold that is not above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"min_similarity is {threshold}; give a number above 0 and at most 1")
        self.threshold = threshold
        self.bands, self.rows = banding(threshold)
        self.texts: list[tuple[Hashable, str]] = []  # with their scopes
        self._places: dict[int, list[int]] = {}

    def _keys(self, text: str, scope: Hashable) -> list[int]:
        bands = signature(text)[: self.bands * self.rows].reshape(self.bands, self.rows)
        # numbers in place of what they stand for save memory; where two collide, the comparison decides
        return [hash((scope, number, band.tobytes())) for number, band in enumerate(bands)]

    def add(self, text: str, scope: Hashable = None) -> None:
        """Keep a normalised text."""
        for key in self._keys(text, scope):
            self._places.setdefault(key, []).append(len(self.texts))
        self.texts.append((scope, text))

    def nearest(self, text: str, scope: Hashable = None) -> tuple[float, int] | None:
        """(similarity, place) of the most similar text of the scope, of equals the earliest; None if none is near."""
        candidates = {place for key in self._keys(text, scope) for place in self._places.get(key, ())}
        compared = [
            (similarity(text, self.texts[place][1]), place) for place in candidates if self.texts[place][0] == scope
        ]
        near = [found for found in compared if found[0] >= self.threshold]
        return min(near, key=lambda found: (-found[0], found[1]), default=None)


@functools.cache
def _multipliers() -> NDArray[np.uint64]:
    """uint64 [2, NUM_HASHES, 1]: odd factors and summands of multiply-shift hashing, the same in every process.

    Source: Dietzfelbinger 1996, https://doi.org/10.1007/3-540-60922-9_46
    """
    rng = random.Random(0)
    factors = [rng.getrandbits(64) | 1 for _ in range(NUM_HASHES)]
    summands = [rng.getrandbits(64) for _ in range(NUM_HASHES)]
    return np.array([factors, summands], dtype=np.uint64)[..., None]


def signature(text: str) -> NDArray[np.uint64]:
    """MinHash of a normalised text, uint64 [NUM_HASHES]: the least of its pieces under each of many orders."""
    pieces = [zlib.crc32(piece.encode("utf-8", "surrogatepass")) for piece in shingles(text)]
    factors, summands = _multipliers()
    hashes = (factors * np.array(pieces, dtype=np.uint64) + summands) >> np.uint64(32)  # [NUM_HASHES, pieces]
    least: NDArray[np.uint64] = hashes.min(axis=1)
    return least
