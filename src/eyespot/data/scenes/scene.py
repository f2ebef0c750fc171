"""Where things lie, and what of them can be seen: the truth of a scene, without any word.

Two rules keep what is hidden independent of which thing lies in front, so that no answer can be told from a name:

- No object shares more than 40% of its area with all others together, whether they lie before it or behind it; so at
  least 60% of every object is visible.
- The order from back to front is drawn at random.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eyespot.data.boxes import Box
from eyespot.data.scenes.drawing import GRID, RGB, Background, ScenePicture, Stamp, mask

MAX_SHARED = 0.4
MIN_OVERLAP = 0.1  # of the smaller object, from which on one is said to be behind the other

_SIDES = range(20, 50, 2)
_MIN_SIDE = 12
_ANGLES = range(-24, 25, 8)
_TRIES = 24
_SHRINK = 0.9
_AIMED = 0.35  # share of objects that are meant to overlap another
_BRIGHTEST, _DARKEST = 255, 150  # of a background: characters have black outlines


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One thing: its character, the box of what can be seen of it, and which share of it that is."""

    char: str
    box: Box
    visible: float


@dataclass(frozen=True, slots=True)
class Scene:
    """The picture and what is in it, from back to front; `behind` has the pairs (i, j) in which j clearly hides a part
    of i."""

    picture: ScenePicture
    objects: tuple[SceneObject, ...]
    behind: frozenset[tuple[int, int]]

    def once(self) -> list[int]:
        """Indices of the objects whose kind occurs once: those that a name points at."""
        chars = [thing.char for thing in self.objects]
        return [index for index, char in enumerate(chars) if chars.count(char) == 1]


def make_scene(chars: Sequence[str], rng: random.Random, image_size: int) -> Scene:
    """A scene of the given characters; one that is given twice is drawn twice."""
    order = list(chars)
    rng.shuffle(order)
    background = draw_background(rng)
    shrink = 1.0
    while (stamps := _placed(order, rng, shrink)) is None:
        shrink *= _SHRINK
    objects, behind = _truth(stamps)
    return Scene(ScenePicture(image_size, background, tuple(stamps)), objects, behind)


def draw_background(rng: random.Random) -> Background:
    """Plain, stripes, a chessboard, a gradient or clouds, in two to sixteen light colours."""
    kind = rng.choice(("plain", "stripes", "board", "gradient", "clouds"))
    one, other = _light(rng), _light(rng)
    number = rng.randrange(3, 9)
    if kind == "plain":
        return Background(1, (one,), smooth=False)
    if kind == "stripes":
        fields = tuple((one, other)[i % 2] for i in range(number))
        return Background(rng.choice((1, number)), fields, smooth=False)
    if kind == "board":
        fields = tuple((one, other)[(i + j) % 2] for i in range(number) for j in range(number))
        return Background(number, fields, smooth=False)
    if kind == "gradient":
        return Background(rng.choice((1, 2)), (one, other), smooth=True)
    return Background(4, tuple(_light(rng) for _ in range(16)), smooth=True)


def _light(rng: random.Random) -> RGB:
    red, green, blue = (rng.randint(_DARKEST, _BRIGHTEST) for _ in range(3))
    return red, green, blue


def _placed(chars: Sequence[str], rng: random.Random, shrink: float) -> list[Stamp] | None:
    """A place for every character, or None if one of them found none."""
    stamps: list[Stamp] = []
    shared: list[float] = []  # area of each object that others share, as if these never shared the same
    for char in chars:
        side = max(_MIN_SIDE, 2 * round(rng.choice(_SIDES) * shrink / 2))
        angle = rng.choice(_ANGLES)
        aimed = bool(stamps) and rng.random() < _AIMED
        for attempt in range(_TRIES):
            x, y = _centre(rng, mask(char, side, angle), rng.choice(stamps) if aimed and attempt < _TRIES / 2 else None)
            stamp = Stamp(char, x, y, side, angle)
            overlaps = [overlap(stamp, other) for other in stamps]
            totals = [sum(overlaps), *(a + b for a, b in zip(shared, overlaps, strict=True))]
            if all(t <= MAX_SHARED * area(*s.shape) for t, s in zip(totals, [stamp, *stamps], strict=True)):
                stamps.append(stamp)
                shared = [*totals[1:], totals[0]]
                break
        else:
            return None
    return stamps


def _centre(rng: random.Random, shape: NDArray[np.bool_], aim: Stamp | None) -> tuple[int, int]:
    """A random centre, inside the picture for all of the patch; beside `aim` if there is one."""
    half = len(shape) // 2
    low, high = half, GRID - half
    if aim is None:
        return rng.randint(low, high), rng.randint(low, high)
    turn = rng.uniform(0, 2 * math.pi)
    distance = rng.uniform(0.6, 0.9) * (half + aim.side / 2)
    x, y = aim.x + distance * math.cos(turn), aim.y + distance * math.sin(turn)
    return min(max(round(x), low), high), min(max(round(y), low), high)


@functools.lru_cache(maxsize=16_384)
def area(char: str, side: int, angle: int) -> int:
    """Units of the grid that a character covers if nothing hides it."""
    return int(np.count_nonzero(mask(char, side, angle)))


def overlap(a: Stamp, b: Stamp) -> int:
    """Units of the grid that both would cover."""
    first, second = mask(*a.shape), mask(*b.shape)
    one_side, other_side = len(first), len(second)
    shift = (one_side - other_side) // 2
    across, down = b.x - a.x + shift, b.y - a.y + shift  # from the corner of the first patch to that of the second
    if not (-other_side < across < one_side and -other_side < down < one_side):
        return 0
    one = first[max(down, 0) : down + other_side, max(across, 0) : across + other_side]
    two = second[max(-down, 0) : one_side - down, max(-across, 0) : one_side - across]
    return int(np.count_nonzero(one & two))


def _truth(stamps: Sequence[Stamp]) -> tuple[tuple[SceneObject, ...], frozenset[tuple[int, int]]]:
    """What a person would find by looking: see `Scene`."""
    on_top = np.full((GRID, GRID), -1, dtype=np.int8)  # index of the object that is seen at each unit
    for index, stamp in enumerate(stamps):
        _window(on_top, stamp)[mask(*stamp.shape)] = index
    objects = []
    for index, stamp in enumerate(stamps):
        seen = _window(on_top, stamp) == index
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        left, top = stamp.x - len(seen) // 2, stamp.y - len(seen) // 2
        edges = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        box = Box(*(float(edge) / GRID for edge in edges))
        objects.append(SceneObject(stamp.char, box, float(np.count_nonzero(seen)) / area(*stamp.shape)))
    return tuple(objects), frozenset(_behind(stamps, on_top))


def _behind(stamps: Sequence[Stamp], on_top: NDArray[np.int8]) -> Iterator[tuple[int, int]]:
    for i, stamp in enumerate(stamps):
        hiding = np.bincount(_window(on_top, stamp)[mask(*stamp.shape)], minlength=len(stamps))
        for j in range(i + 1, len(stamps)):
            if hiding[j] >= MIN_OVERLAP * min(area(*stamp.shape), area(*stamps[j].shape)):
                yield i, j


def _window(grid: NDArray[np.int8], stamp: Stamp) -> NDArray[np.int8]:
    """The part of the grid under a stamp's patch, int8 [M, M]; the patch lies inside the grid."""
    half = len(mask(*stamp.shape)) // 2
    return grid[stamp.y - half : stamp.y + half, stamp.x - half : stamp.x + half]
