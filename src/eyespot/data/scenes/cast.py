"""Which things meet in a scene. Some are popular, some go together, some never meet in training.

The things stand on a circle, and every rule is the same for a thing and for the one eight places further. So a question
about a thing that is there has a twin about one that is not, equally likely in every other respect: the "stand-ins"
below. The number of things should be a multiple of eight, else the twins at the seam of the circle differ a little.

Popular and related things are those that a model without eyes would guess.
Source: Li et al., arXiv 2305.10355, section 5 (random, popular and adversarial sampling of absent objects).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

HeldOut = Literal["none", "combinations", "names"]
Split = Literal["train", "test"]

MAX_OBJECTS = 8
MAX_COUNT = 5
MIN_THINGS = 16
MIN_THINGS_APART = 64  # leave room for eight things that all may meet
COUNTING = 0.5
RELATED = 0.5  # share of things that are drawn because a neighbour of theirs is there
POPULAR_WEIGHT = 3

_PERIOD = 8
_POPULAR = (0, 4)
_RESERVED = 5
_APART = (3, 10)  # places on the circle between things that are held out as a combination


@dataclass(frozen=True)
class Cast:
    """The characters of a data set, in the order of the circle.

    held_out: "combinations" (pairs that never meet in training; a test scene has at least one of them), "names" (an
        eighth of the things is never drawn in training; test questions are about these) or "none".
    counting: share of scenes with 1 to 5 of one thing; the others have one of each.

    Raises:
        ValueError: an unknown word, a share outside [0, 1], or too few characters.
    """

    chars: tuple[str, ...]
    split: Split = "train"
    held_out: HeldOut = "none"
    counting: float = COUNTING

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("split", self.split, ("train", "test")),
            ("held_out", self.held_out, ("none", "combinations", "names")),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choices: {', '.join(choices)}")
        if not 0 <= self.counting <= 1:
            raise ValueError(f"counting is {self.counting}; it is a share of the scenes, from 0 to 1")
        least = MIN_THINGS_APART if self.held_out == "combinations" else MIN_THINGS
        if len(self.chars) < least:
            raise ValueError(f"{len(self.chars)} things are too few for held_out={self.held_out!r}; give {least}")

    def draw(self, rng: random.Random) -> tuple[list[str], str | None]:
        """Characters of a scene, each as often as it occurs, and the one that may be counted, if any."""
        if rng.random() >= self.counting:
            return self.kinds(rng, rng.randint(1, MAX_OBJECTS)), None
        times, others = rng.randint(1, MAX_COUNT), rng.randint(0, MAX_OBJECTS - MAX_COUNT)
        counted, *rest = self.kinds(rng, 1 + others)
        return [counted] * times + rest, counted

    def kinds(self, rng: random.Random, number: int) -> list[str]:
        """Different characters; the first is one that questions are about."""
        found = [rng.choice(self._first)]
        if self.split == "test" and self.held_out == "combinations":
            found.append(self._at(found[0], rng.choice((-1, 1)) * rng.choice(_APART)))
        while len(found) < number:
            char = rng.choice(self.related(rng.choice(found))) if rng.random() < RELATED else rng.choice(self._pool)
            if char not in found and self._may_meet(char, found):
                found.append(char)
        return found

    @cached_property
    def subjects(self) -> frozenset[str]:
        """The characters that questions are about."""
        if self.held_out != "names":
            return frozenset(self.chars)
        reserved = frozenset(self.chars[_RESERVED::_PERIOD])
        return reserved if self.split == "test" else frozenset(self.chars) - reserved

    @cached_property
    def popular(self) -> frozenset[str]:
        return frozenset(char for first in _POPULAR for char in self.chars[first::_PERIOD])

    def related(self, char: str) -> tuple[str, str]:
        """The neighbours on both sides among the things that are drawn at all."""
        return self._related[char]

    def stand_ins(self, char: str) -> tuple[str, ...]:
        """The characters that differ from this one in nothing but what they are, and itself."""
        return self.chars[self._place[char] % _PERIOD :: _PERIOD]

    @cached_property
    def _drawn(self) -> tuple[str, ...]:
        return tuple(char for char in self.chars if self.split == "test" or char in self.subjects)

    @cached_property
    def _first(self) -> tuple[str, ...]:
        return self._weighted(tuple(char for char in self.chars if char in self.subjects))

    @cached_property
    def _pool(self) -> tuple[str, ...]:
        return self._weighted(self._drawn)

    def _weighted(self, chars: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(char for char in chars for _ in range(POPULAR_WEIGHT if char in self.popular else 1))

    @cached_property
    def _related(self) -> dict[str, tuple[str, str]]:
        drawn = self._drawn
        return {char: (drawn[i - 1], drawn[(i + 1) % len(drawn)]) for i, char in enumerate(drawn)}

    @cached_property
    def _place(self) -> dict[str, int]:
        return {char: index for index, char in enumerate(self.chars)}

    def _at(self, char: str, steps: int) -> str:
        return self.chars[(self._place[char] + steps) % len(self.chars)]

    def _may_meet(self, char: str, others: list[str]) -> bool:
        if self.split == "test" or self.held_out != "combinations":
            return True
        apart = {self._at(char, sign * steps) for sign in (-1, 1) for steps in _APART}
        return apart.isdisjoint(others)
