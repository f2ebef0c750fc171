"""One optimizer step over pairs of pictures and texts, each compared with all others of the step on all devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eyespot.config import TrainerSettings
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
from eyespot.models.vlm import VLM
from eyespot.training.gather import gather_rows, gather_texts
from eyespot.training.module import VLMModule
from eyespot.training.processes import numbers_of_all


class AlignModule(VLMModule):
    """A VLM that learns which texts belong to which pictures; what is drawn at random depends on seed and step alone.

    Every device has its rows of the global batch and computes their share of each loss: against the vectors of all
    rows, with negatives from all rows, divided by what all rows have to be divided by. So the sum over devices is what
    one device with all rows would compute.

    Args:
        model, settings, num_steps: see VLMModule.
        weights: of the losses, by name: contrastive, sigmoid, matching, caption.
    """

    def __init__(self, model: VLM, settings: TrainerSettings, num_steps: int, weights: Mapping[str, float]) -> None:
        super().__init__(model, settings, num_steps)
        self.weights = dict(weights)

    def training_step(self, window: Window, batch_idx: int) -> None:
        """One optimizer step over a Window of one batch of pairs."""
        super().training_step(window, batch_idx)
        self.head.limit_scale()
        names = sorted(self.shares)
        sums = numbers_of_all([float(self.shares[name]) for name in names], self.device).sum(dim=0).tolist()
        self.step_metrics |= {f"train/{name}": value for name, value in zip(names, sums, strict=True)}
        self.step_metrics["train/scale"] = float(self.scale)

    def _backward(self, window: Window) -> Tensor:
        """Gradients of the whole step; returns this device's share of the loss.

        A step in which some device has no usable pair is skipped on all of them, for it would wait for ever.
        """
        counts = [int(count) for count in numbers_of_all([len(window.ids)], self.device)[:, 0]]
        self.shares = dict.fromkeys(self.weights, torch.zeros((), device=self.device))
        if min(counts) == 0:
            return torch.zeros((), device=self.device)
        draws = uniform(self.settings.seed, self.global_step, counts, self.global_rank)
        self.shares = self.losses(window.batches[0], counts, draws)
        loss = self._weighted(self.shares)
        # data parallelism averages gradients; the sum over all devices is wanted
        self.manual_backward(loss * self.trainer.world_size)
        self.shares = {name: share.detach() for name, share in self.shares.items()}
        return loss.detach()

    def validation_step(self, window: Window, batch_idx: int) -> None:
        """Losses of a batch in which every device has rows; if one has none left, of the own rows alone."""
        counts = [int(count) for count in numbers_of_all([len(window.ids)], self.device)[:, 0]]
        rank = self.global_rank
        if min(counts) == 0:
            counts, rank = [len(window.ids)], 0
        if not window.ids:
            return
        draws = uniform(self.settings.seed, batch_idx, counts, rank)
        shares = self.losses(window.batches[0], counts, draws)
        sums = [float(self._weighted(shares)), *(float(shares[name]) for name in self.weights), 0]
        self._validated += torch.tensor(sums, dtype=torch.float64) * sum(counts)
        self._validated[-1] += len(window.ids)

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros(2 + len(self.weights), dtype=torch.float64)  # summed losses, and rows

    def on_validation_epoch_end(self) -> None:
        *sums, count = numbers_of_all(self._validated.tolist(), self.device).sum(0).tolist()
        for name, total in zip(("loss", *self.weights), sums, strict=True):
            if count:
                self.log(f"val/{name}", total / count, sync_dist=True)

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

    def _total(self, own: int, counts: Sequence[int]) -> int:
        """The sum over the devices that take part."""
        return own if len(counts) == 1 else int(numbers_of_all([own], self.device).sum())

    def _weighted(self, shares: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * share for name, share in shares.items()]).sum()


def uniform(seed: int, step: int, counts: Sequence[int], rank: int) -> Tensor:
    """One number in [0, 1) for each row and direction of a step, float32 [2, n]: what a process gets does not depend on
    how many there are, only on which rows it has."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    first = sum(counts[:rank])
    return torch.rand(sum(counts), 2, generator=generator)[first : first + counts[rank]].t()
