"""Rows of all processes, with gradients that find their way back to the process of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed


class _Gather(torch.autograd.Function):
    """[...] -> [W, ...]; the gradient of a row is the sum of what all processes say about it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        total: Tensor = grads[0].contiguous()
        distributed.all_reduce(total)
        return total[distributed.get_rank()]


def gather_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes in the order of their ranks; all processes must call this with the same counts.

    Args:
        own: [n, ...], of a shape that differs between processes in the first axis only.
        counts: n of every process; with one process nothing is sent.

    Returns:
        [sum of counts, ...].
    """
    if len(counts) == 1:
        return own
    missing = max(counts) - own.shape[0]
    padded = F.pad(own, (0, 0) * (own.dim() - 1) + (0, missing))
    everyone: Tensor = _Gather.apply(padded)  # type: ignore[no-untyped-call]
    return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])


def gather_texts(own: Tensor, counts: Sequence[int]) -> Tensor:
    """``gather_rows`` of columns of tokens int64 [n, T], whose T may differ; shorter rows are padded with 0."""
    if len(counts) == 1:
        return own
    width = torch.tensor(own.shape[1], device=own.device)
    distributed.all_reduce(width, distributed.ReduceOp.MAX)
    return gather_rows(F.pad(own, (0, int(width) - own.shape[1])), counts)
