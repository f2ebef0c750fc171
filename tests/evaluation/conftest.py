from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest


@dataclass(frozen=True)
class StandIn:
    """The fields of eyespot.data.sample.Sample that evaluation reads."""

    id: str
    images: tuple[Any, ...]
    messages: tuple[dict[str, Any], ...]
    answers: tuple[str, ...]
    group: str
    kind: str = ""
    options: tuple[str, ...] = ()


def make_sample(
    name: str, images: Sequence[Any], question: str, answer: str, group: str, more: Sequence[str] = ()
) -> StandIn:
    content: list[dict[str, str]] = [{"type": "image"} for _ in images]
    messages = (
        {"role": "user", "content": [*content, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )
    return StandIn(name, tuple(images), messages, (answer, *more), group)


def make_samples(num_pictures: int = 40) -> list[StandIn]:
    """Pictures are texts such as ``red-3``: their colour is what is asked, twice, and whether they are red."""
    colours = ("red", "green", "blue", "teal")
    samples = []
    for number in range(num_pictures):
        colour = colours[number % 4]
        image, group = f"{colour}-{number}", f"picture {number}"
        samples.append(make_sample(f"{number}-a", [image], "what color is it?", colour, group))
        is_red = "yes" if colour == "red" else "no"
        samples.append(make_sample(f"{number}-b", [image], "is the shape red?", is_red, group))
    return samples


class Seeing:
    """Reads the colour out of the picture's name; keeps every conversation it was handed, by batch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[Any, Any]]] = []

    def answer_batch(self, conversations: Sequence[tuple[Any, Any]], max_new_tokens: int) -> list[str]:
        self.batches.append(list(conversations))
        return [self.answer(images, messages[-1]["content"][-1]["text"]) for images, messages in conversations]

    def answer(self, images: Sequence[str], question: str) -> str:
        colour = images[0].split("-")[0] if images else "red"
        return colour if question.startswith("what") else "Yes." if colour == "red" else "No."


class Blind(Seeing):
    def answer(self, images: Sequence[str], question: str) -> str:
        return "green" if question.startswith("what") else "no"


class Lost(Blind):
    """Answers from the words when there is any picture, and nonsense when there is none."""

    def answer(self, images: Sequence[str], question: str) -> str:
        return super().answer(images, question) if images else "???"


@pytest.fixture
def samples() -> list[StandIn]:
    return make_samples()


@pytest.fixture(scope="session")
def fakes() -> SimpleNamespace:
    return SimpleNamespace(Seeing=Seeing, Blind=Blind, Lost=Lost, sample=make_sample, samples=make_samples)
