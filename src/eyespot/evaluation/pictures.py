"""What a run did, as pictures in its folder: answers before and after, the loss, and how long patch features are."""

from __future__ import annotations

import functools
import json
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eyespot.config import TrainSettings
from eyespot.data import mixture
from eyespot.data.collate import image_key
from eyespot.data.sample import ImageSource, Message, Sample
from eyespot.evaluation.benchmarks.base import load_questions, make_benchmark
from eyespot.evaluation.finish import smoothed
from eyespot.inference import MAX_NEW_TOKENS, Assistant
from eyespot.processing.images import open_image
from eyespot.processing.processor import Processor
from eyespot.training.run import Run

BEFORE_FILE, GRID_FILE, LOSS_FILE, PATCHES_FILE = "before.json", "before_after.png", "loss.png", "patches.png"
COLUMNS, MOST_PATCHES = 4, 4
FONT, LETTERS = "DejaVu Sans Mono", 48  # comes with matplotlib; letters in a line of a picture's width
LOOKED_THROUGH = 200  # samples in which different pictures are looked for
BEFORE_COLOR, AFTER_COLOR, TRUTH_COLOR = "#8a8a8a", "#1f4e9c", "#2b7a3d"
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shown:
    """A picture of the data, what is asked about it, and what the data answers."""

    image: ImageSource
    asked: tuple[Message, ...]
    truth: str

    @property
    def question(self) -> str:
        return " ".join(part["text"] for part in self.asked[-1]["content"] if part["type"] == "text")


class Pictures:
    """Asks the untrained model, and draws when training is over.

    Args:
        settings: of the run; its test data is shown, or its validation data, or else its training data.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.shown = [first_turn(sample) for sample in different(_samples(settings), settings.evaluation.pictures)]

    def ask_untrained(self, assistant: Assistant) -> None:
        """The answers before the first step, kept in the run's folder for a run that is interrupted."""
        file = Path(self.settings.output_dir) / self.settings.name / BEFORE_FILE
        file.write_text(json.dumps(self._answers(assistant), ensure_ascii=False, indent=2), encoding="utf-8")
        assistant.forget()

    def write(self, run: Run) -> list[Path]:
        """The three pictures, in the run's folder.

        Raises:
            ImportError: matplotlib is not installed.
        """
        assert run.assistant is not None
        run.assistant.forget()
        asked = run.folder / BEFORE_FILE
        before = json.loads(asked.read_text(encoding="utf-8")) if asked.is_file() else ["(not asked)"] * len(self.shown)
        files = [run.folder / name for name in (LOSS_FILE, GRID_FILE, PATCHES_FILE)]
        draw_loss(run.curve, run.validation, files[0])
        if not self.shown:
            return files[:1]
        draw_grid(self.shown, before, self._answers(run.assistant), files[1])
        draw_patches(run.assistant, [shown.image for shown in self.shown[:MOST_PATCHES]], files[2])
        return files

    def _answers(self, assistant: Assistant) -> list[str]:
        conversations = [([shown.image], list(shown.asked)) for shown in self.shown]
        return assistant.answer_batch(conversations, self.settings.evaluation.max_new_tokens or MAX_NEW_TOKENS)


def _samples(settings: TrainSettings) -> list[Sample]:
    data = settings.data
    if (held_out := data.test or data.validation) is None:
        return mixture.read(data.train, LOOKED_THROUGH)[0]
    return load_questions(make_benchmark(held_out), LOOKED_THROUGH)[0]


def different(samples: Sequence[Sample], count: int) -> list[Sample]:
    """A choice of samples about one picture each, no picture twice; always the same for the same samples."""
    found = {image_key(s): s for s in reversed(samples) if len(s.images) == 1 and len(s.messages) > 1}
    unique = list(reversed(found.values()))
    return random.Random(0).sample(unique, min(count, len(unique)))


def first_turn(sample: Sample) -> Shown:
    """The question of the first turn and its answer."""
    place = next(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")
    truth = " ".join(part["text"] for part in sample.messages[place]["content"] if part["type"] == "text")
    return Shown(sample.images[0], sample.messages[:place], truth)


# --- drawing -----------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures of a run need matplotlib; pip install "eyespot[pictures]"') from error
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def draw_grid(shown: Sequence[Shown], before: Sequence[str], after: Sequence[str], file: Path) -> None:
    """Every picture over its question, the answer before training, the answer after it, and the truth."""
    rows = -(-len(shown) // COLUMNS)
    cells = [_lines(one, b, a) for one, b, a in zip(shown, before, after, strict=True)]
    text_height = 0.19 * max(len(cell) for cell in cells)
    columns = min(COLUMNS, len(shown))
    figure = _figure(3.1 * columns, (2.5 + text_height) * rows)
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.5, text_height] * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (one, cell) in enumerate(zip(shown, cells, strict=True)):
        picture, words = axes[2 * (i // columns)][i % columns], axes[2 * (i // columns) + 1][i % columns]
        picture.imshow(np.asarray(open_image(one.image)))
        picture.set_anchor("SW")
        picture.set(xticks=[], yticks=[])
        picture.set_axis_on()
        picture.spines[:].set_color("#cccccc")
        for number, (line, color) in enumerate(cell):
            place = 1 - number * 0.19 / text_height
            words.text(
                0, place, line, color=color, fontsize=7.5, family=FONT, va="top", parse_math=False,
                transform=words.transAxes, in_layout=False,
            )  # fmt: skip
    _save(figure, file)


def _lines(one: Shown, before: str, after: str) -> list[tuple[str, str]]:
    texts = [("", one.question, "black"), ("before: ", before, BEFORE_COLOR), ("after: ", after, AFTER_COLOR),
             ("truth: ", one.truth, TRUTH_COLOR)]  # fmt: skip
    return [
        (line, color)
        for name, text, color in texts
        if name or text
        for line in textwrap.wrap(name + (_printable(text) or "(nothing)"), LETTERS, max_lines=4, placeholder=" …")
    ]


def _printable(text: str) -> str:
    """An untrained model writes anything; what the font cannot draw becomes an empty square."""
    return "".join(letter if letter.isspace() or ord(letter) in _letters() else "\u25a1" for letter in text).strip()


@functools.cache
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FONT)).get_charmap())


def draw_loss(curve: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]], file: Path) -> None:
    """Training loss of every step, its running mean, and validation loss."""
    figure = _figure(6.4, 3.8)
    axis = figure.subplots()
    axis.plot(*_columns(curve), color="#b9cbe8", linewidth=1.0, label="training, each step")
    axis.plot(*_columns(smoothed(curve, 30)), color=AFTER_COLOR, linewidth=1.8, label="training, mean")
    if validation:
        axis.plot(*_columns(validation), color="#c25a00", marker="o", markersize=4, label="validation")
    axis.set(xlabel="step", ylabel="loss")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    _save(figure, file)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def draw_patches(assistant: Assistant, images: Sequence[ImageSource], file: Path) -> None:
    """Pictures as the encoder reads them, and over them the length of each patch's feature vector."""
    figure = _figure(6.0, 2.6 * len(images))
    axes = figure.subplots(len(images), 2, squeeze=False)
    for row, image in zip(axes, images, strict=True):
        picture, lengths = patch_lengths(assistant, image)
        extent = (0, picture.shape[1], picture.shape[0], 0)
        for axis, shown in zip(row, (picture, picture.mean(axis=2)), strict=True):
            axis.set_axis_off()
            axis.imshow(shown, extent=extent, cmap="gray")
        middle = float(lengths.mean())
        # a last normalisation may make all equally long; rounding is not to look like a difference
        limits = {"vmin": min(lengths.min(), 0.99 * middle), "vmax": max(lengths.max(), 1.01 * middle)}
        heat = row[1].imshow(lengths, extent=extent, cmap="inferno", alpha=0.7, **limits)
        figure.colorbar(heat, ax=row[1], fraction=0.046, pad=0.04)
    axes[0][0].set_title("what the encoder reads", fontsize=9)
    axes[0][1].set_title("length of the patch features", fontsize=9)
    _save(figure, file)


@torch.inference_mode()
def patch_lengths(assistant: Assistant, image: ImageSource) -> tuple[Array, Array]:
    """A picture as the encoder reads it, float [H, W, 3] from 0 to 1, and the L2 norms of its patch features [s, s]."""
    config = assistant.model.config
    patches = assistant.features([image])[0, config.num_prefix_tokens if config.keep_cls else 0 :]  # [P, E]
    lengths = patches.float().norm(dim=-1)
    side = round(len(lengths) ** 0.5)
    return as_read(assistant.processor, image), lengths.view(side, side).cpu().numpy()


def as_read(processor: Processor, image: ImageSource) -> Array:
    """A picture cut and resized as the encoder reads it, in its own colours: float32 [H, W, 3] from 0 to 1."""
    pixels, reader = processor.pixel_values([image])[0], processor.image_processor  # [3, H, W]
    if getattr(reader, "do_normalize", True):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (reader.image_mean, reader.image_std))
        pixels = pixels * std + mean
    return pixels.clamp(0, 1).permute(1, 2, 0).numpy()


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
