"""AdamW with a learning rate for each part, and a schedule that knows how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from eyespot.models.vlm import PARTS


def parameter_groups(model: nn.Module, lr: Mapping[str, float], weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters by part, vectors (biases, norms) without weight decay.

    Raises:
        ValueError: nothing is trainable, or a trainable parameter is not float32.
    """
    groups = []
    for part in PARTS:
        if (module := getattr(model, part)) is None:
            continue
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        for name, parameter in named:
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"{part}.{name} is trainable in {parameter.dtype}; AdamW rounds small steps to zero there, so "
                    f"set model.{part}.dtype=float32"
                )
        for decays in (True, False):
            chosen = [p for _, p in named if (p.dim() > 1) == decays]
            if chosen:
                decay = weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": lr[part], "weight_decay": decay, "name": f"{part}-{decays}"})
    if not groups:
        raise ValueError("no parameter is trainable; set a part to full or lora")
    return groups


def adamw(
    model: nn.Module, lr: Mapping[str, float], weight_decay: float, betas: Sequence[float], eps: float
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), its update fused into one kernel."""
    groups = parameter_groups(model, lr, weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def learning_rate_factor(step: int, num_steps: int, warmup_share: float, decay: str) -> float:
    """Factor on the peak learning rate at a step: linear warm-up, then linear or half-cosine decay to 0, or constant.

    Cosine: SGDR, arXiv 1608.03983, without restarts.
    """
    warmup = math.ceil(num_steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if decay == "constant":
        return 1.0
    return 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def schedule(optimizer: torch.optim.Optimizer, num_steps: int, warmup_share: float, decay: str) -> LambdaLR:
    """The schedule over exactly ``num_steps`` optimizer steps."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps, warmup_share, decay))
