"""One optimizer step over one batch with several weighted losses, each summed over all devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eyespot.config import TrainerSettings
from eyespot.data.collate import Window
from eyespot.models.text_sides import Batch
from eyespot.models.vlm import VLM
from eyespot.training.module import VLMModule
from eyespot.training.processes import numbers_of_all


class LossesModule(VLMModule):
    """A VLM that learns from something else than its own next words.

    Every device has its rows of the global batch and computes their share of each loss, divided by what all rows have
    to be divided by. So the sum over devices is what one device with all rows would compute.

    Args:
        model, settings, num_steps: see VLMModule.
        weights: of the losses, by name.
    """

    metrics: tuple[str, ...] = ()  # of a validation, beside the losses

    def __init__(self, model: VLM, settings: TrainerSettings, num_steps: int, weights: Mapping[str, float]) -> None:
        super().__init__(model, settings, num_steps)
        self.weights = dict(weights)

    def shares_of(self, batch: Batch, counts: Sequence[int], step: int, rank: int) -> dict[str, Tensor]:
        """This device's share of each loss, float32 scalars by name.

        Args:
            batch: the rows of this device. counts: rows of every device, or of this one alone.
            step, rank: what may decide about chance, with the seed and nothing else.
        """
        raise NotImplementedError

    def measured(self, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Of a batch of the validation that was just computed: by the names in ``metrics`` a sum and its divisor."""
        return {}

    def training_step(self, window: Window, batch_idx: int) -> None:
        """One optimizer step over a Window of one batch."""
        super().training_step(window, batch_idx)
        names = sorted(self.shares)
        sums = numbers_of_all([float(self.shares[name]) for name in names], self.device).sum(dim=0).tolist()
        self.step_metrics |= {f"train/{name}": value for name, value in zip(names, sums, strict=True)}

    def _backward(self, window: Window) -> Tensor:
        """Gradients of the whole step; returns this device's share of the loss.

        A step in which some device has no usable row is skipped on all of them, for it would wait for ever.
        """
        counts = [int(count) for count in numbers_of_all([len(window.ids)], self.device)[:, 0]]
        self.shares = dict.fromkeys(self.weights, torch.zeros((), device=self.device))
        if min(counts) == 0:
            return torch.zeros((), device=self.device)
        self.shares = self.shares_of(window.batches[0], counts, self.global_step, self.global_rank)
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
        shares = self.shares_of(window.batches[0], counts, batch_idx, rank)
        sums = [float(self._weighted(shares)), *(float(shares[name]) for name in self.weights), 0]
        self._validated += torch.tensor(sums, dtype=torch.float64) * sum(counts)
        self._validated[-1] += len(window.ids)
        measured = self.measured(window.batches[0])
        self._measured += torch.tensor([measured[name] for name in self.metrics], dtype=torch.float64).view(-1, 2)

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros(2 + len(self.weights), dtype=torch.float64)  # summed losses, and rows
        self._measured = torch.zeros(len(self.metrics), 2, dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        *sums, count = numbers_of_all(self._validated.tolist(), self.device).sum(0).tolist()
        for name, total in zip(("loss", *self.weights), sums, strict=True):
            if count:
                self.log(f"val/{name}", total / count, sync_dist=True)
        measured = numbers_of_all(self._measured.flatten().tolist(), self.device).sum(0).view(-1, 2).tolist()
        for name, (total, divisor) in zip(self.metrics, measured, strict=True):
            if divisor:
                self.log(f"val/{name}", total / divisor, sync_dist=True)

    def _total(self, own: int, counts: Sequence[int]) -> int:
        """The sum over the devices that take part."""
        return own if len(counts) == 1 else int(numbers_of_all([own], self.device).sum())

    def _weighted(self, shares: Mapping[str, Any]) -> Tensor:
        return torch.stack([self.weights[name] * share for name, share in shares.items()]).sum()
