"""One optimizer step, as Lightning runs it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import lightning
import torch
from torch import Tensor

from eyespot.config import TrainerSettings
from eyespot.data.collate import Window
from eyespot.models.vlm import VLM
from eyespot.training.optim import adamw, schedule


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, on which samples, and what to do."""


class VLMModule(lightning.LightningModule):
    """A VLM under an optimizer. Optimization is manual: one call is one step over all micro-batches of a window, and
    every loss is divided by the number of supervised tokens in the whole window, on all devices.

    Args:
        model: composed, its parts set frozen, full or lora.
        settings: the trainer's.
        num_steps: optimizer steps of the whole run.
    """

    automatic_optimization = False
    strict_loading = False  # frozen weights are not in a training checkpoint

    def __init__(self, model: VLM, settings: TrainerSettings, num_steps: int) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.num_steps = num_steps
        self.last_good = "none yet"

    def configure_optimizers(self) -> Any:
        s = self.settings
        optimizer = adamw(self.model, asdict(s.lr), s.weight_decay, s.betas, s.eps)
        return [optimizer], [schedule(optimizer, self.num_steps, s.warmup_share, s.decay)]

    def training_step(self, window: Window, batch_idx: int) -> None:
        """One optimizer step over a Window."""
        optimizer: Any = self.optimizers()
        # a step without any usable sample still counts, so that steps and data positions stay in line
        num_items = max(1, int(self._sum(window.num_supervised)))
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(window.batches):
            last = i == len(window.batches) - 1
            with nullcontext() if last else self._without_sync():
                # data parallelism averages gradients; the sum over all devices is wanted
                loss = self.model(**batch, num_items_in_batch=num_items).loss * self.trainer.world_size
                self._check_finite(loss, window)
                self.manual_backward(loss)
            total += loss.detach()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trainable, self.settings.clip)
        self._check_finite(norm, window, "gradient norm")
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.step_metrics = {
            "train/loss": float(self._sum(total)) / self.trainer.world_size,
            "train/grad_norm": float(norm),
            **{f"lr/{g['name'].split('-')[0]}": g["lr"] for g in optimizer.param_groups},
        }

    def validation_step(self, window: Window, batch_idx: int) -> None:
        for batch in window.batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            loss = self.model(**batch).loss
            self.log("val/loss", loss, batch_size=count, on_epoch=True, on_step=False, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def transfer_batch_to_device(self, batch: Window, device: torch.device, dataloader_idx: int) -> Window:
        batch.batches = [{k: v.to(device, non_blocking=True) for k, v in b.items()} for b in batch.batches]
        return batch

    def _check_finite(self, value: Tensor, window: Window, what: str = "loss") -> None:
        if not math.isfinite(float(value.detach())):
            raise TrainingStopped(
                f"{what} is {float(value.detach())} at step {self.global_step}; samples {', '.join(window.ids[:8])}"
                f"{', …' if len(window.ids) > 8 else ''}; last good checkpoint: {self.last_good}; "
                "lower trainer.lr or trainer.clip, or look at these samples with `eyespot inspect data`"
            )

    def _sum(self, value: Any) -> Any:
        if self.trainer.world_size == 1:
            return value
        return self.all_gather(torch.as_tensor(value, device=self.device)).sum()  # type: ignore[union-attr]

    def _without_sync(self) -> Any:
        strategy_model: Any = self.trainer.strategy.model
        return getattr(strategy_model, "no_sync", nullcontext)()
