"""Head and cross-entropy in one operation: logits live for a few rows at a time, gradients are made on the way.

For V words and S supervised tokens, the plain form keeps several [S, V] arrays until the backward pass. Here a chunk of
rows is multiplied, scored, turned into its own gradient in place and multiplied back before the next one starts. The
idea is that of Liger Kernel (arXiv 2410.10989, section 3.2) and of cut cross-entropy (arXiv 2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eyespot.models.head import head_product

CHUNK_ELEMENTS = 2**25  # logits at once: 128 MiB in float32


class FusedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of ``cap * tanh(scale * (h W' + b) / cap)``; without a cap, of ``scale * (h W' + b)``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        """hidden [S, D], weight [V, D], bias [V] or None, targets int64 [S] -> float32 scalar."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            states, wanted = hidden[rows], targets[rows].unsqueeze(-1)
            logits = head_product(states, weight, bias).float()
            if scale != 1:
                logits *= scale
            slope = None
            if cap is not None:
                logits = logits.div_(cap).tanh_()
                slope = 1 - logits.square() if any(ctx.needs_input_grad) else None
                logits *= cap
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += (normalizer - logits.gather(-1, wanted)).sum()
            if not any(ctx.needs_input_grad):
                continue
            # the gradient with respect to the logits is softmax minus one at the target
            grad = logits.sub_(normalizer).exp_()
            grad.scatter_add_(-1, wanted, grad.new_full(wanted.shape, -1.0))
            if slope is not None:
                grad *= slope
            if scale != 1:
                grad *= scale
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ states
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return (*grads, None, None, None)


def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """Summed cross-entropy; products in the dtype of autocast if it is on, else in that of the weight.

    Args:
        hidden: float [S, D]. weight: float [V, D]. bias: float [V] or None. targets: int64 [S].
        scale: factor on the logits. cap: soft cap on them (Gemma 2, arXiv 2408.00118, section 2).

    Returns:
        float32 scalar.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        loss: Tensor = FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets, scale, cap
        )
    return loss
