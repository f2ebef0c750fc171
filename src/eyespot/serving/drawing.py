"""Figures beside an answer: the boxes that it names, and what it depended on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from PIL.Image import Image, Resampling

from eyespot.data.boxes import draw_boxes, parse_boxes, parse_named
from eyespot.data.sample import Message, Sample
from eyespot.evaluation.cards import Dependence, overlay
from eyespot.evaluation.pictures import as_read
from eyespot.inference import Assistant
from eyespot.processing import prompt
from eyespot.relevance import answer_map

Trace = Callable[[Sequence[Image], Sequence[prompt.Message]], Image]
"""Pictures and a conversation that ends with an answer -> a picture of what this answer depended on."""

SHORTEST = 480  # pixels of a figure's longer side: lines and labels are to be smooth
LETTERS = 24  # of a label


def with_boxes(picture: Image, answer: str) -> Image | None:
    """The picture with the boxes of an answer, and with their names if each has one; None if there is no box."""
    boxes, named = parse_boxes(answer), parse_named(answer)
    if not boxes:
        return None
    labels = [_short(name) for name, _ in named] if len(named) == len(boxes) else None
    return draw_boxes(enlarged(picture), boxes, labels)


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def enlarged(picture: Image) -> Image:
    """At least `SHORTEST` pixels on its longer side."""
    share = SHORTEST / max(picture.size)
    if share <= 1:
        return picture
    across, down = (max(1, round(share * side)) for side in picture.size)
    return picture.resize((across, down), Resampling.BICUBIC)


def trace_of(assistant: Assistant) -> Trace:
    """Draws the picture in grey and over it each place the warmer, the more the last answer rests on it.

    Measured by gradient times input (`eyespot.relevance.gradient_relevance`), as in the reports of evaluations.
    """

    def trace(images: Sequence[Image], messages: Sequence[prompt.Message]) -> Image:
        sample = Sample("page", tuple(images), cast("tuple[Message, ...]", tuple(messages)))
        found = answer_map(assistant, sample)
        dependence = Dependence(as_read(assistant.processor, images[0]), found.cpu().numpy(), "gradient times input")
        return enlarged(overlay(dependence))

    return trace
