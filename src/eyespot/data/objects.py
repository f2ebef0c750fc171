"""Pictures with the objects in them, as batches for a loss that looks for each at its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eyespot.data.boxes import Box, parse_named
from eyespot.data.collate import Collator, Window
from eyespot.data.features import FeatureStore
from eyespot.data.pairs import NoPair, pair_of
from eyespot.data.sample import Rejected, Sample
from eyespot.processing.images import ImageError
from eyespot.processing.processor import Processor


class ObjectCollator(Collator):
    """Samples whose answer lists all objects with their boxes -> Window of one batch.

    The batch holds pixel_values float32 [N, 3, H, W] or image_features float [N, P, E]; name_ids int64 [M, L], the
    tokens of each different name as they stand within a sentence, plus one, 0 behind the end; and of the O objects
    object_image and object_name int64 [O], object_box float32 [O, 4], left, top, right and bottom as shares of the
    picture.

    Args:
        processor: of the model.
        features: of the pictures, instead of the pictures.
    """

    def __init__(self, processor: Processor, *, features: FeatureStore | None = None) -> None:
        super().__init__(processor, 1, None, None, features)
        self._ids: dict[str, list[int]] = {}

    def __call__(self, units: Sequence[Sequence[Sample]]) -> Window:
        window = Window()
        pictures: list[Any] = []
        found: list[tuple[int, str, Box]] = []
        for sample in (sample for unit in units for sample in unit):
            try:
                image, objects = objects_of(sample)
                picture = self._open(image)
            except (NoPair, ImageError) as error:
                window.rejected.append(Rejected(sample.id, str(error)))
                continue
            found += ((len(pictures), name, box) for name, box in objects)
            pictures.append(picture)
            window.ids.append(sample.id)
        if pictures:
            window.num_tokens = len(pictures) * self.processor.num_image_tokens
            window.batches.append(self._with_images(self._objects(found), pictures))
        return window

    def whole(self) -> ObjectCollator:
        """The same; there is only one batch in a window."""
        return self

    def _objects(self, found: Sequence[tuple[int, str, Box]]) -> dict[str, Tensor]:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(name for _, name, _ in found))}
        return {
            "name_ids": self._name_ids(list(numbers)),
            "object_image": torch.tensor([image for image, _, _ in found], dtype=torch.long),
            "object_name": torch.tensor([numbers[name] for _, name, _ in found], dtype=torch.long),
            "object_box": torch.tensor([box for _, _, box in found], dtype=torch.float32),
        }

    def _name_ids(self, names: Sequence[str]) -> Tensor:
        for name in names:
            if name not in self._ids:
                ids = self.processor.tokenizer(f" {name}", add_special_tokens=False).input_ids
                self._ids[name] = [id + 1 for id in ids]
        rows = [torch.tensor(self._ids[name]) for name in names]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def objects_of(sample: Sample) -> tuple[Any, list[tuple[str, Box]]]:
    """The picture of a sample and the objects that its one answer lists, each with a box.

    Raises:
        NoPair: there is not exactly one of each, or the answer has no name with a box.
    """
    image, text = pair_of(sample)
    if not (objects := parse_named(text)):
        raise NoPair(
            f"no object in its answer {text[:60]!r}, which should read like 'dog 00 10 50 99, pear 50 00 99 99'; "
            "formats scenes and detection give such answers with questions=[detect]"
        )
    return image, objects
