"""One optimizer step, as Lightning runs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import lightning
import torch
from torch import Tensor

from eyespot.config import TrainerSettings
from eyespot.data.collate import Window
from eyespot.models.vlm import VLM
from eyespot.training.optim import adamw, schedule
from eyespot.training.processes import from_all, numbers_of_all
from eyespot.training.sharding import gathered, shard, whole


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, on which samples, and what to do."""


class ProcessLost(TrainingStopped):
    """Another process of the run is gone. Every one that is left says so; what else stops a run, the first one says."""


class VLMModule(lightning.LightningModule):
    """A VLM under an optimizer. Optimization is manual: one call is one step over all micro-batches of a window, and
    every loss is divided by the number of supervised tokens in the whole window, on all devices.

    With several processes all of them make the same number of passes over the same parameters, whatever samples each
    has, or one would wait for the others for ever; and they stop at the same step.

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
        self.stop_signal = 0  # that this process got
        self.agreed_signal = 0  # that any process had got at the end of the last step
        self.step_counts = (0, 0)  # samples and tokens of the last step, on all devices

    def configure_model(self) -> None:
        if self._device_mesh is not None:  # only the sharded strategy has one
            shard(self.model, self._device_mesh)

    def configure_optimizers(self) -> Any:
        s = self.settings
        optimizer = adamw(self.model, asdict(s.lr), s.weight_decay, s.betas, s.eps)
        return [optimizer], [schedule(optimizer, self.num_steps, s.warmup_share, s.decay)]

    def training_step(self, window: Window, batch_idx: int) -> None:
        """One optimizer step over a Window."""
        optimizer: Any = self.optimizers()
        total = self._backward(window)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        norm = whole(torch.nn.utils.clip_grad_norm_(trainable, self.settings.clip))
        sums = numbers_of_all([float(total), len(window.ids), window.num_tokens, self.stop_signal], self.device)
        self._check_finite(sums[:, 0], window, "loss")
        self._check_finite(norm, window, "gradient norm")
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.step_counts = int(sums[:, 1].sum()), int(sums[:, 2].sum())
        self.agreed_signal = int(sums[:, 3].max())
        self.step_metrics = {
            "train/loss": float(sums[:, 0].sum()),
            "train/grad_norm": float(norm),
            **{f"lr/{g['name'].split('-')[0]}": g["lr"] for g in optimizer.param_groups},
        }

    def _backward(self, window: Window) -> Tensor:
        """Gradients of the whole window; returns this device's share of the loss, float32 scalar."""
        shown = any(map(has_pictures, window.batches))
        sizes = numbers_of_all([window.num_supervised, len(window.batches), shown], self.device)
        # a step without any usable sample still counts, so that steps and data positions stay in line
        num_items = max(1, int(sizes[:, 0].sum()))
        num_passes, pictures = int(sizes[:, 1].max()), bool(sizes[:, 2].any())
        total = torch.zeros((), device=self.device)
        for i in range(num_passes):
            batch = window.batches[i] if i < len(window.batches) else None
            with nullcontext() if i == num_passes - 1 else self._without_sync():
                loss = self._loss(batch, num_items, pictures)
                if loss.requires_grad:  # words alone teach a frozen language model nothing
                    # data parallelism averages gradients; the sum over all devices is wanted
                    self.manual_backward(loss * self.trainer.world_size)
            total += loss.detach()
        return total

    def _loss(self, batch: dict[str, Tensor] | None, num_items: int, pictures: bool) -> Tensor:
        """The loss of a micro-batch, float32 scalar.

        Args:
            batch: None when this process has none left and another one has; its passes must find a partner.
            pictures: some process shows a picture in this step.
        """
        if batch is None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            loss: Tensor = self.model(input_ids=ids, labels=ids, num_items_in_batch=1).loss * 0
        else:
            loss = self.model(**batch, num_items_in_batch=num_items).loss
        if self.trainer.world_size > 1 and pictures and not (batch and has_pictures(batch)):
            learning = [p for part in (self.model.vision, self.model.connector) for p in part.parameters()]
            loss = loss + 0 * sum(p.sum() for p in learning if p.requires_grad)
        return loss

    def validation_step(self, window: Window, batch_idx: int) -> None:
        batches: Sequence[dict[str, Tensor] | None] = window.batches or [None]
        for batch in batches:
            count = 0 if batch is None else int((batch["labels"][:, 1:] != -100).sum())
            loss = self._loss(batch, max(1, count), pictures=False)
            self._validated += torch.tensor([float(loss) * count, count], dtype=torch.float64)

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros(2, dtype=torch.float64)  # summed loss and supervised tokens

    def on_validation_epoch_end(self) -> None:
        total, count = numbers_of_all(self._validated.tolist(), self.device).sum(0).tolist()
        if count:
            # by ourselves: Lightning averages whole numbers over processes as whole numbers
            self.log("val/loss", total / count, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {}  # trained.safetensors beside it has them, whatever the strategy

    def transfer_batch_to_device(self, batch: Window, device: torch.device, dataloader_idx: int) -> Window:
        batch.batches = [{k: v.to(device, non_blocking=True) for k, v in b.items()} for b in batch.batches]
        return batch

    def _check_finite(self, value: Tensor, window: Window, what: str) -> None:
        """value: float scalar that is the same in all processes, or float [W] with one number of each."""
        if math.isfinite(found := float(value.detach().sum())):
            return
        blameless = value.dim() == 1 and math.isfinite(float(value[self.global_rank]))
        ids = [name for names in from_all([] if blameless else window.ids) for name in names]
        raise TrainingStopped(
            f"{what} is {found} at step {self.global_step}; samples {', '.join(ids[:8])}"
            f"{', …' if len(ids) > 8 else ''}; last good checkpoint: {self.last_good}; "
            "lower trainer.lr or trainer.clip, or look at these samples with `eyespot inspect data`"
        )

    def _without_sync(self) -> Any:
        """Gradients stay in this process. Sharded ones are brought together at once: nobody has room for all."""
        strategy_model: Any = self.trainer.strategy.model
        return getattr(strategy_model, "no_sync", nullcontext)()

    def whole_weights(self) -> AbstractContextManager[None]:
        """Inside, the model computes in this process alone; all processes must enter."""
        return nullcontext() if self._device_mesh is None else gathered(self.model)


def has_pictures(batch: dict[str, Tensor]) -> bool:
    return "pixel_values" in batch or "image_features" in batch
