"""One optimizer step over pictures whose objects are known: what is where, read from the image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eyespot.models.connectors.conv import Cells
from eyespot.models.detection import (
    Detection,
    Objects,
    box_loss,
    count_loss,
    iou,
    name_loss,
    name_targets,
    name_vectors,
    word_loss,
)
from eyespot.models.text_sides import Batch
from eyespot.training.gather import gather_texts
from eyespot.training.losses_module import LossesModule
from eyespot.training.processes import numbers_of_all

SURE = 0.5  # probability from which on a cell is said to hold an object


class DetectModule(LossesModule):
    """A VLM whose image tokens learn which object is centred in their cell, and its box.

    Every cell is compared with the names of all objects in the step, on all devices.

    Args:
        model, settings, num_steps: see VLMModule.
        weights: of the losses, by name: names, words, boxes, counts.
    """

    metrics = ("found", "right", "iou")

    def shares_of(self, batch: Batch, counts: Sequence[int], step: int, rank: int) -> dict[str, Tensor]:
        """See LossesModule; batch: see ObjectCollator."""
        cells = self._cells(batch)
        names, objects = self._global_names(batch, counts)
        num_objects = max(1, self._total(len(objects.name), counts))
        self._found = logits, boxes = self._read(cells, names, objects)
        targets = name_targets(objects, logits.shape)
        names_found, names_there = logits, targets
        if cells.scores is not None:  # as if "something" were a name, too
            names_found = torch.cat([logits, cells.scores.float().unsqueeze(-1)], dim=-1)
            names_there = torch.cat([targets, targets.amax(-1, keepdim=True)], dim=-1)
        shares = {
            "names": name_loss(names_found, names_there) / num_objects,
            "words": word_loss(cells.tokens, names, objects) / num_objects,
            "counts": count_loss(logits, targets) / num_objects,
            "boxes": box_loss(boxes, objects.box, cells.tokens.shape[1]) / num_objects,
        }
        self._objects = objects
        return {name: shares[name] for name in self.weights}

    def measured(self, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """found: objects whose cell says their name, of all. right: names that cells say, that are there, of all that
        are said. iou: of the boxes of all objects, with the truth."""
        logits, boxes = self._found
        said = logits.sigmoid() > SURE
        true = name_targets(self._objects, logits.shape) > 0
        right, ious = float((said & true).sum()), iou(boxes, self._objects.box)
        return {
            "found": (right, float(true.sum())),
            "right": (right, float(said.sum())),
            "iou": (float(ious.sum()), len(ious)),
        }

    def _cells(self, batch: Batch) -> Cells:
        features = batch.get("image_features")
        if features is None:
            features = self.model.encode_images(batch["pixel_values"])
        connector: Any = self.model.connector
        if hasattr(connector, "all_cells"):
            cells: Cells = connector.all_cells(self.model.connector_inputs(features))
            return cells
        return Cells(self.model.embed_images(image_features=features))

    @property
    def head(self) -> Detection:
        assert self.model.detection is not None
        return self.model.detection

    def _read(self, cells: Cells, names: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
        """Scores of all cells and names, float32 [N, K, M], and boxes of the objects' cells, float32 [O, 4]."""
        places = objects.image, objects.cells(cells.tokens.shape[1])
        boxes = self.head.boxes(cells.tokens[places]) if cells.boxes is None else cells.boxes[places].float()
        return self.head.name_logits(cells.tokens, names), boxes

    def _global_names(self, batch: Batch, counts: Sequence[int]) -> tuple[Tensor, Objects]:
        """Vectors of the names of all devices, each once, float32 [M, D], and the own objects with their numbers."""
        own = batch["name_ids"]
        lengths = [len(own)] if len(counts) == 1 else numbers_of_all([len(own)], self.device)[:, 0].int().tolist()
        rows, numbers = gather_texts(own, lengths).unique(dim=0, return_inverse=True)
        first = sum(lengths[: self.global_rank]) if len(counts) > 1 else 0
        name = numbers[first : first + len(own)][batch["object_name"]]
        vectors = name_vectors(self.model.get_input_embeddings(), rows)
        return vectors, Objects(batch["object_image"], name, batch["object_box"])
