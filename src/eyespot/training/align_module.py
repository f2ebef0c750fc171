"""One optimizer step over pairs of pictures and texts, each compared with all others of the step on all devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eyespot.data.collate import Window
from eyespot.models.alignment import (
    Alignment,
    same_pairs,
    sample_negatives,
    sigmoid_contrastive,
    similarity,
    softmax_contrastive,
)
from eyespot.models.text_sides import Batch, text_side
from eyespot.training.gather import gather_rows, gather_texts
from eyespot.training.losses_module import LossesModule


class AlignModule(LossesModule):
    """A VLM that learns which texts belong to which pictures; what is drawn at random depends on seed and step alone.

    The own rows are compared with the vectors of all rows, and negatives come from all rows.

    Args:
        model, settings, num_steps: see VLMModule.
        weights: of the losses, by name: contrastive, sigmoid, matching, caption.
    """

    def training_step(self, window: Window, batch_idx: int) -> None:
        """One optimizer step over a Window of one batch of pairs."""
        super().training_step(window, batch_idx)
        self.head.limit_scale()
        self.step_metrics["train/scale"] = float(self.scale)

    def shares_of(self, batch: Batch, counts: Sequence[int], step: int, rank: int) -> dict[str, Tensor]:
        """See LossesModule; batch: see PairCollator."""
        return self.losses(batch, counts, uniform(self.settings.seed, step, counts, rank))

    def losses(self, batch: Batch, counts: Sequence[int], draws: Tensor) -> dict[str, Tensor]:
        """This device's share of each loss, float32 scalars by name.

        Args:
            batch: the rows of this device, see PairCollator.
            counts: rows of every device, or of this one alone.
            draws: float [2, n], what decides about negatives of the own n rows.
        """
        side = text_side(self.model)
        features = batch.get("image_features")
        images = side.images(self.model.encode_images(batch["pixel_values"]) if features is None else features)
        keys = [batch["image_keys"], batch["text_keys"]]
        same = same_pairs(*keys, *(gather_rows(key, counts) for key in keys))  # [n, N]
        shares = {}
        if set(self.weights) - {"caption"}:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._compares):
                to_texts, to_images = self._similarities(side, images, batch, counts)
            shares = self._contrastive(to_texts, to_images, same)
        if "matching" in self.weights:
            negatives = [
                sample_negatives(self.scale * rows.detach(), same, own)
                for rows, own in zip((to_texts, to_images), draws, strict=True)
            ]
            shares["matching"] = self._matching(side, images, batch, counts, *negatives)
        if "caption" in self.weights:
            num_targets = self._total(side.num_targets(batch), counts)
            shares["caption"] = side.caption_loss(images, batch, num_targets)
        return shares

    @property
    def head(self) -> Alignment:
        assert self.model.alignment is not None
        return self.model.alignment

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by before negatives are drawn: as the loss that is trained does."""
        is_sigmoid = "sigmoid" in self.weights and "contrastive" not in self.weights
        return (self.head.sigmoid_log_scale if is_sigmoid else self.head.log_scale).detach().exp()

    @property
    def _compares(self) -> bool:
        return bool({"contrastive", "sigmoid"} & set(self.weights))

    def _similarities(self, side: Any, images: Tensor, batch: Batch, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of the own pictures with all texts, and of the own texts with all pictures, float32 [n, N] each."""
        image_vectors = self.head.image_vectors(side.image_states(images))
        text_vectors = self.head.text_vectors(side.text_states(batch))
        all_texts, all_images = gather_rows(text_vectors, counts), gather_rows(image_vectors, counts)
        return similarity(image_vectors, all_texts), similarity(all_images, text_vectors).t()

    def _contrastive(self, to_texts: Tensor, to_images: Tensor, same: Tensor) -> dict[str, Tensor]:
        num_rows = same.shape[1]
        shares = {}
        if "contrastive" in self.weights:
            scale = self.head.log_scale.exp()
            both = softmax_contrastive(scale * to_texts, same) + softmax_contrastive(scale * to_images, same)
            shares["contrastive"] = both / (2 * num_rows)
        if "sigmoid" in self.weights:
            logits = self.head.sigmoid_log_scale.exp() * to_texts + self.head.sigmoid_bias
            shares["sigmoid"] = sigmoid_contrastive(logits, same) / num_rows
        return shares

    def _matching(
        self,
        side: Any,
        images: Tensor,
        batch: Batch,
        counts: Sequence[int],
        texts_drawn: tuple[Tensor, Tensor],
        images_drawn: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Every pair, every picture with a wrong text and every text with a wrong picture; cross-entropy over all.

        Source: arXiv 2107.07651, section 3.2.
        """
        (wrong_texts, has_text), (wrong_images, has_image) = texts_drawn, images_drawn
        shown = torch.cat([images, images[has_text], gather_rows(images, counts)[wrong_images[has_image]]])
        told = []
        for name in side.columns:
            own, everyone = batch[name], gather_texts(batch[name], counts)
            own = F.pad(own, (0, everyone.shape[1] - own.shape[1]))
            told.append(torch.cat([own, everyone[wrong_texts[has_text]], own[has_image]]))
        labels = (torch.arange(len(shown), device=images.device) < len(images)).long()
        logits = self.head.match_logits(side.match_states(shown, *told))
        return F.cross_entropy(logits, labels, reduction="sum") / self._total(len(labels), counts)


def uniform(seed: int, step: int, counts: Sequence[int], rank: int) -> Tensor:
    """One number in [0, 1) for each row and direction of a step, float32 [2, n]: what a process gets does not depend on
    how many there are, only on which rows it has."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    first = sum(counts[:rank])
    return torch.rand(sum(counts), 2, generator=generator)[first : first + counts[rank]].t()
