"""Samples to batches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from eyespot.data.features import FeatureStore
from eyespot.data.packing import fill_rows, pack, share_prefixes
from eyespot.data.sample import ImageSource, Rejected, Sample
from eyespot.processing.images import ImageError, open_image
from eyespot.processing.processor import Encoded, Processor
from eyespot.processing.prompt import PromptError

Row = tuple[Encoded, list[Any], Hashable]


@dataclass
class Window:
    """What one optimizer step reads on one device.

    batches: micro-batches, each what the model's forward takes: input_ids and labels int64 [B, T], attention_mask or
        the columns of packed rows int64 [B, T], pixel_values float32 [N, 3, H, W] or image_features float [N, P, E].
    num_supervised: labelled tokens in all of them. num_tokens: tokens of all samples, as if each stood alone.
    ids: sample ids. rejected: samples that could not be used.
    """

    batches: list[dict[str, Tensor]] = field(default_factory=list)
    num_supervised: int = 0
    num_tokens: int = 0
    ids: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


class Collator:
    """Units (samples about the same pictures) -> Window of micro-batches.

    A sample whose picture cannot be read, or that has nothing to learn within ``max_length``, is left out and named.

    Args:
        processor: of the model.
        accumulate: micro-batches in a window; units are dealt out evenly.
        max_length: samples are cut there.
        row_length: rows are packed up to this many tokens; None gives each sample its own padded row.
        features: of the pictures, instead of the pictures.
    """

    def __init__(
        self,
        processor: Processor,
        accumulate: int = 1,
        max_length: int | None = None,
        row_length: int | None = None,
        features: FeatureStore | None = None,
    ) -> None:
        self.processor, self.accumulate = processor, accumulate
        self.max_length, self.row_length, self.features = max_length, row_length, features

    def __call__(self, units: Sequence[Sequence[Sample]]) -> Window:
        window = Window()
        share = -(-len(units) // self.accumulate)
        for start in range(0, len(units), max(1, share)):
            samples = [sample for unit in units[start : start + share] for sample in unit]
            opened: dict[Hashable, list[Any]] = {}  # samples about one picture open it once
            rows = [row for sample in samples if (row := self._row(sample, window, opened)) is not None]
            if rows:
                window.batches.append(self._padded(rows) if self.row_length is None else self._packed(rows))
        return window

    def whole(self) -> Collator:
        """The same collator, with one micro-batch for each window."""
        return Collator(self.processor, 1, self.max_length, self.row_length, self.features)

    def _row(self, sample: Sample, window: Window, opened: dict[Hashable, list[Any]]) -> Row | None:
        key = image_key(sample)
        try:
            encoded = self.processor.encode_conversation(sample.messages, self.max_length)
            images = opened.get(key) or [self._open(image) for image in sample.images]
        except (PromptError, ImageError) as error:
            window.rejected.append(Rejected(sample.id, str(error)))
            return None
        window.ids.append(sample.id)
        window.num_supervised += encoded.num_supervised
        window.num_tokens += len(encoded.input_ids)
        opened[key] = images
        return encoded, images, key

    def _open(self, image: ImageSource) -> Any:
        """What becomes of a picture in the batch: the picture itself, or its features [P, E]."""
        if self.features is None:
            return open_image(image)
        try:
            return self.features[image]
        except KeyError:
            open_image(image)  # says what is wrong with it
            raise ImageError(f"{str(image)[:80]!r} changed after its features were cached; start again") from None

    def _padded(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = self.processor.pad([encoded for encoded, _, _ in rows], "right")
        return self._with_images(batch, [image for _, images, _ in rows for image in images])

    def _packed(self, rows: list[Row]) -> dict[str, Tensor]:
        assert self.row_length is not None
        documents = share_prefixes(rows, self.processor.image_token_id, self.row_length)
        batch, images = pack(fill_rows(documents, self.row_length), self.processor.pad_token_id)
        return self._with_images(batch, images)

    def _with_images(self, batch: dict[str, Tensor], images: list[Any]) -> dict[str, Tensor]:
        if images and self.features is not None:
            batch["image_features"] = torch.stack(images)
        elif images:
            batch["pixel_values"] = self.processor.pixel_values(images)
        return batch


def image_key(sample: Sample) -> tuple[Hashable, ...]:
    """Equal for samples about the same pictures: opened pictures compare by identity, all others by value."""
    return tuple(id(image) if isinstance(image, PIL.Image.Image) else image for image in sample.images)
