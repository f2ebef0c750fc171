"""An exported model answers as ours does, or it is not handed over (invariant I14): logits and greedy text are compared
on ten pictures.

Letters in shapes: S new tokens, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from numpy.typing import NDArray
from torch import Tensor

from eyespot.files import make_folder
from eyespot.inference import Assistant, user_turn
from eyespot.processing.images import open_image
from eyespot.registry import EXPORTS

TOLERANCE = 1e-4  # of float32 logits, absolute and relative
QUESTION = "What is in this picture?"
MAX_NEW_TOKENS = 12
PARITY_FILE = "parity.json"


class Reply(NamedTuple):
    """A greedy answer: its text, the S new tokens (the end included), and the logits float32 [S, V] each was taken
    from."""

    text: str
    tokens: list[int]
    logits: NDArray[np.float32]


class Consumer(Protocol):
    """An exported model, opened by the program it was exported for.

    ``tolerance`` is what its arithmetic allows logits to differ, absolute and relative: TOLERANCE for float32. A
    program that tells nothing but log-probabilities gives those, and has ``log_probabilities`` set; one that reads no
    pictures has ``questions`` of its own.
    """

    tolerance: float

    def answer(self, picture: PIL.Image.Image, question: str, max_new_tokens: int) -> Reply:
        """A greedy answer to a question about an RGB picture."""
        ...


class ParityError(ValueError):
    """An exported model that does not answer as ours does."""


class ExportError(ValueError):
    """A model that a format cannot hold."""


def refuse(format: str, reason: str, cure: str) -> NoReturn:
    """Raise ExportError with the reason and the nearest alternative."""
    raise ExportError(f"this model cannot be exported as {format}: {reason}; {cure}")


@dataclass(frozen=True)
class Compared:
    """One picture (its name, or the question where there is none): what both said, and the largest difference between
    logits of the same step, in so many steps."""

    picture: str
    answer: str
    num_tokens: int
    num_compared: int
    largest_difference: float


@dataclass(frozen=True)
class Parity:
    """What the comparison found; ``seconds`` are those of all answers."""

    format: str
    question: str
    tolerance: float
    largest_difference: float
    seconds_eyespot: float
    seconds_exported: float
    pictures: list[Compared]

    def write(self, folder: Path) -> None:
        (folder / PARITY_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.format}: {len(self.pictures)} questions, greedy answers equal, logits differ by at most "
            f"{self.largest_difference:.1e} (limit {self.tolerance:.0e}), {self.seconds_exported:.2f} s "
            f"(eyespot {self.seconds_eyespot:.2f} s)"
        )


def export_model(assistant: Assistant, format: str, folder: str | Path, pictures: Sequence[Any] = ()) -> Parity:
    """Write a model in a format of EXPORTS, and check it; the folder appears whole or not at all.

    Args:
        assistant: float32 on the CPU.
        folder: new. pictures: to compare on (paths, bytes, PIL); by default drawn ones.

    Raises:
        ExportError: the format cannot hold this model. ParityError: what was written answers differently.
        ValueError: the folder exists, or the model is not float32 on the CPU.
    """
    target = check_target(format, folder)
    check_float32(assistant)
    found: list[Parity] = []

    def fill(partial: Path) -> None:
        consumer = EXPORTS[format](assistant, partial)
        found.append(check(assistant, consumer, format, pictures))
        found[0].write(partial)

    make_folder(target, fill)
    return found[0]


def check_target(format: str, folder: str | Path) -> Path:
    """The folder as a path; quick, to be asked before a model is loaded.

    Raises:
        ValueError: it exists, or there is no such format.
    """
    EXPORTS[format]
    if Path(folder).exists():
        raise ValueError(f"{str(folder)!r} exists already; give a new folder, or delete it first")
    return Path(folder)


def check_float32(assistant: Assistant) -> None:
    """Raise ValueError unless the model is float32 on the CPU, where its logits can be compared to 1e-4."""
    kinds = {(parameter.device.type, parameter.dtype) for parameter in assistant.model.parameters()}
    if other := sorted(kinds - {("cpu", torch.float32)}, key=str):
        device, dtype = other[0]
        raise ValueError(
            f"the model is {str(dtype).removeprefix('torch.')} on {device}; exports are compared in float32 on the "
            "CPU, so load it with device='cpu', dtype='float32'"
        )


def check(
    assistant: Assistant,
    consumer: Consumer,
    format: str,
    pictures: Sequence[Any] = (),
    question: str = QUESTION,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Parity:
    """Compare greedy answers of both, and the logits they were taken from.

    Raises:
        ParityError: a text or a logit differs; the message names the picture.
    """
    prompt = assistant.processor.encode_prompt(user_turn([None], question)).input_ids
    max_new_tokens = min(max_new_tokens, assistant._room(len(prompt)))
    compared, ours_s, theirs_s = [], 0.0, 0.0
    answer: Any = consumer.answer
    for name, picture, words in asked(consumer, pictures, question):
        started = time.perf_counter()
        ours = reply(assistant, picture, words, max_new_tokens)
        between = time.perf_counter()
        theirs = answer(picture, words, max_new_tokens)
        ours_s, theirs_s = ours_s + between - started, theirs_s + time.perf_counter() - between
        if getattr(consumer, "log_probabilities", False):
            ours = ours._replace(logits=log_probabilities(ours.logits))
        compared.append(compare(name, ours, theirs, consumer.tolerance))
    if not any(row.num_compared for row in compared):
        raise ParityError(
            f"all {len(compared)} answers ended before a logit could be compared, so nothing is known about the "
            "exported model; ask about other pictures"
        )
    largest = max(row.largest_difference for row in compared)
    return Parity(format, question, consumer.tolerance, largest, ours_s, theirs_s, compared)


def compare(picture: str, ours: Reply, theirs: Reply, tolerance: float) -> Compared:
    """Two answers about one picture.

    Logits are compared up to the first step that chose different tokens, because behind it the inputs differ. A column
    that is minus infinity in ours is the placeholder, which others may not have, and in theirs a word that their
    program tells nothing about.

    Raises:
        ParityError: they differ.
    """
    pairs = zip(ours.tokens, theirs.tokens, strict=False)
    num_equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours.tokens), len(theirs.tokens)))
    steps = min(num_equal + 1, len(ours.tokens), len(theirs.tokens))
    known = np.flatnonzero(np.isfinite(ours.logits[0]))
    a, b = ours.logits[:steps, known], theirs.logits[:steps, known]
    told = b != -np.inf
    difference = np.abs(a - b)[told]
    largest = float(difference.max(initial=0))
    allowed = bool(np.all(difference <= tolerance * (1 + np.abs(a[told]))) and told.any(-1).all())  # False for NaN
    if not allowed or ours.text != theirs.text:
        raise ParityError(
            f"the exported model answers {theirs.text!r} about {picture} where ours answers {ours.text!r}, with logits "
            f"that differ by up to {largest:.1e} (limit {tolerance:.0e}); do not use it, and report the parts of this "
            "model"
        )
    return Compared(picture, ours.text, len(ours.tokens), steps, largest)


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [S, V] -> [S, V]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found.astype(np.float32)


@torch.inference_mode()
def reply(
    assistant: Assistant,
    picture: PIL.Image.Image | None,
    question: str,
    max_new_tokens: int,
    image_embeds: Tensor | None = None,
) -> Reply:
    """Our model's greedy answer; with ``image_embeds`` float [1, K, D] in place of the picture's own."""
    model, processor = assistant.model, assistant.processor
    pictures = [] if picture is None else [picture]
    batch = processor.prompt_batch([(pictures, user_turn(pictures, question))])
    if image_embeds is not None:
        del batch["pixel_values"]
        batch["inputs_embeds"] = model.embed(batch["input_ids"], image_embeds)
    output = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    tokens = output.sequences[0, batch["input_ids"].shape[1] :].tolist()
    return Reply(processor.decode_answer(tokens), tokens, torch.cat(output.logits).numpy())


def asked(consumer: Consumer, pictures: Sequence[Any], question: str) -> list[tuple[str, PIL.Image.Image | None, str]]:
    """(name, picture, question) of every comparison; a consumer that reads no pictures has ``questions`` of its own."""
    if questions := getattr(consumer, "questions", ()):
        return [(repr(words), None, words) for words in questions]
    return [(name, picture, question) for name, picture in named_pictures(pictures)]


def named_pictures(pictures: Sequence[Any]) -> list[tuple[str, PIL.Image.Image]]:
    """The user's pictures, or ten that are drawn, as (name, RGB)."""
    if not pictures:
        return drawn_pictures()
    return [(str(p) if isinstance(p, (str, Path)) else f"picture {i}", open_image(p)) for i, p in enumerate(pictures)]


def drawn_pictures(count: int = 10) -> list[tuple[str, PIL.Image.Image]]:
    """Shapes of some colour somewhere on another colour, in pictures of several sizes; always the same ones."""
    choose = np.random.default_rng(0)
    colours = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple"]
    drawn = []
    for i in range(count):
        width, height = (int(side) for side in choose.integers(64, 200, 2))
        paper, ink = choose.choice(colours, 2, replace=False)
        shape = ("rectangle", "ellipse", "triangle")[i % 3]
        image = PIL.Image.new("RGB", (width, height), str(paper))
        pen = PIL.ImageDraw.Draw(image)
        left, top = choose.uniform(0, 0.5, 2) * (width, height)
        right, bottom = (left, top) + choose.uniform(0.2, 0.5, 2) * (width, height)
        if shape == "triangle":
            pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=str(ink))
        else:
            getattr(pen, shape)((left, top, right, bottom), fill=str(ink))
        drawn.append((f"drawn picture {i} ({ink} {shape} on {paper})", image))
    return drawn
