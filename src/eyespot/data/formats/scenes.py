"""Drawn scenes with questions, made while they are read: no download, no files, as many as are wanted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from eyespot.data import wording
from eyespot.data.sample import Rejected, Sample
from eyespot.data.scenes.cast import COUNTING, Cast, HeldOut, Split
from eyespot.data.scenes.questions import KINDS, Asker, Question
from eyespot.data.scenes.scene import Scene, make_scene
from eyespot.data.scenes.things import things
from eyespot.registry import closest

MIN_IMAGE_SIZE = 32


def read_scenes(
    num_scenes: int | None = 1000,
    start: int = 0,
    seed: int = 0,
    split: Split = "train",
    held_out: HeldOut = "none",
    objects: str | int | list[str] = "frequent",
    language: str = "en",
    image_size: int = 128,
    questions: list[str] | None = None,
    counting: float = COUNTING,
) -> Iterator[Sample | Rejected]:
    """Pictures of 1 to 8 things with questions whose answers cannot be told from their words.

    Scene number i of a seed is the same in every process, so a stream is gone on with by `start`.

    Args:
        num_scenes: how many; None never ends.
        start: number of the first scene.
        seed: another seed, other scenes.
        split: "train" or "test"; they share no scene.
        held_out: see `Cast`: "combinations" or "names" that training never shows, or "none".
        objects: see `things`.
        language: of the names; sentences are English.
        image_size: pixels of a side. What is in a scene does not depend on it.
        questions: kinds, asked of each scene where it allows them; one that is named twice is asked about two things.
            All eleven kinds once unless given: see `eyespot.data.scenes.questions`.
        counting: share of scenes with 1 to 5 of one thing, which can be counted; the others have one of each.

    Raises:
        ImportError: a package is missing.
        ValueError: a value out of its range, or an unknown word.
    """
    kinds = list(KINDS) if questions is None else questions
    _check(num_scenes, start, image_size, kinds)
    named = things(objects, language)
    cast = Cast(tuple(named), split, held_out, counting)
    noun = wording.english if language == "en" else wording.quoted
    nouns = {char: noun(name) for char, name in named.items()}
    numbers = itertools.count(start) if num_scenes is None else range(start, start + num_scenes)
    for number in numbers:
        # Two sources of chance, so that a scene does not depend on what is asked about it.
        name = f"{split}-{seed}-{number}"
        scene, counted = draw_scene(cast, name, image_size)
        asker = Asker(scene, cast, counted, nouns, random.Random(f"questions-{name}"))
        for place, (kind, question) in enumerate(asker.ask(kinds)):
            yield _sample(f"scenes-{name}-{place}-{kind}", f"scenes-{name}", scene, kind, question)


def draw_scene(cast: Cast, name: str, image_size: int) -> tuple[Scene, str | None]:
    """The scene of a name, and the character in it that may be counted."""
    rng = random.Random(f"scene-{name}")
    chars, counted = cast.draw(rng)
    return make_scene(chars, rng, image_size), counted


def _sample(id: str, group: str, scene: Scene, kind: str, question: Question) -> Sample:
    if kind == "caption":
        return Sample.caption(id, scene.picture, question.answers, question.text, group)
    return Sample.question(id, scene.picture, question.text, question.answers[0], question.answers, group, kind)


def _check(num_scenes: int | None, start: int, image_size: int, kinds: list[str]) -> None:
    if num_scenes is not None and num_scenes < 1:
        raise ValueError(f"num_scenes is {num_scenes}; give 1 or more, or null for a stream without end")
    if start < 0:
        raise ValueError(f"start is {start}; the first scene is number 0")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size is {image_size}; give at least {MIN_IMAGE_SIZE} pixels")
    if not kinds:
        raise ValueError(f"questions is empty; choices: {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown question {kind!r}{closest(kind, list(KINDS))} (choices: {', '.join(KINDS)})")
