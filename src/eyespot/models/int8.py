"""Linear layers in eight bits for answering on a CPU: a quarter of the memory traffic, integer products.

Weights get one scale for each output, activations one for each token, both symmetric and found by the largest value
(LLM.int8, arXiv 2208.07339, section 2.1, without its outlier columns). Answers are close to those of float32, not
always equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eyespot.models.lora_linear import LoRALinear, is_linear
from eyespot.models.vlm import VLM

LARGEST = 127


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows float [N, I] -> (int8 [N, I], scale float32 [N, 1]); values are about integers times scale."""
    scale = values.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / LARGEST
    return (values / scale).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A frozen linear layer, float [..., I] -> float [..., O]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight float [O, I], bias float [O] or None."""
        super().__init__()
        integers, scale = quantize(weight.detach())
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.scale = nn.Parameter(scale.t().contiguous(), requires_grad=False)  # [1, O]
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, row_scale = quantize(x.reshape(-1, x.shape[-1]))
        out = torch._int_mm(rows, self.weight.t()).float()
        out.mul_(row_scale).mul_(self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1).to(x.dtype)


@torch.no_grad()
def to_int8(model: VLM) -> int:
    """Replace the linear layers of encoder and language model, the head included, in place; returns how many there are.

    Adapters are folded into the weights first. The connector and the embeddings stay as they are.

    Raises:
        ValueError: the model is not on a CPU, or an adapter cannot be folded.
    """
    if model.device.type != "cpu":
        raise ValueError(f"int8 is for CPUs, the model is on {model.device}; use dtype=bfloat16 there")
    count = 0
    for part in (model.vision, model.language):
        for parent in list(part.modules()):
            for name, child in list(parent.named_children()):
                linear: Any = _folded(child) if isinstance(child, LoRALinear) else child
                if is_linear(linear):
                    setattr(parent, name, Int8Linear(linear.weight, linear.bias))
                    count += 1
    return count


def _folded(layer: Any) -> nn.Linear:
    """The base layer of an adapted one, the adapter added to its weight."""
    name = layer.plain_adapter()
    if name is None:
        raise ValueError("int8 needs plain adapters, one at a time and at work; use dtype=float32")
    base: nn.Linear = layer.base_layer
    base.weight.data = base.weight.float() + layer.get_delta_weight(name)
    return base
