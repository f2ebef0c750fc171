"""A linear layer and its low-rank adapter as one operation: y = x W' + b + s (x A') B'.

peft computes the adapter beside the layer and adds the two, which moves the layer's whole output through memory three
more times in each direction. Here the adapter is accumulated into the output by its own matrix product, and the scale
goes to the narrow side. Same formula, same result but for rounding (arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class AdaptedLinear(torch.autograd.Function):
    """Gradients for x, b, A and B; the weight W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x float [..., I], weight [O, I], bias [O] or None, a [R, I], b [O, R] -> float [..., O] in the dtype of x."""
        a, b = a.to(x.dtype), b.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.t()  # [T, R]
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        out.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        low_grad = (grad @ b).mul_(ctx.scale)  # [T, R]
        grad_x = grad_a = grad_b = None
        if needs_x:
            grad_x = grad @ weight
            grad_x = grad_x.addmm_(low_grad, a).view(ctx.shape)
        if needs_a:
            grad_a = low_grad.t() @ rows
        if needs_b:
            grad_b = (grad.t() @ low).mul_(ctx.scale)
        return grad_x, None, grad.sum(0) if needs_bias else None, grad_a, grad_b, None


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes what ``nn.Linear`` computes; subclasses may only mark it."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


class LoRALinear(Linear):
    """peft's adapted linear layer; the plain case of one active adapter without dropout at work goes through
    AdaptedLinear."""

    def plain_adapter(self) -> str | None:
        """The name of the one active adapter of a plain layer that does not learn now; None if anything is special."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        special = (
            self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant
            or (self.training and not isinstance(self.lora_dropout[names[0]], nn.Identity)) or self.lora_bias[names[0]]
            or not is_linear(self.base_layer)
            or (self.base_layer.weight.requires_grad and torch.is_grad_enabled())
        )  # fmt: skip
        return None if special else names[0]

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Called by peft for another adapter, which would replace or silence this one.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"adapter {adapter_name!r} cannot be put beside the model's own; call model.merge_adapters() first, which "
            "adds those to the weights"
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self.plain_adapter()
        if name is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Any = self.base_layer
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        adapted: Tensor = AdaptedLinear.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), base.weight.to(dtype), bias, self.lora_A[name].weight, self.lora_B[name].weight,
            self.scaling[name],
        )  # fmt: skip
        return adapted


def fuse(module: nn.Module) -> int:
    """Let every adapted linear layer of a module compute in one operation; returns how many there are."""
    layers = [layer for layer in module.modules() if type(layer) is Linear and not layer.fan_in_fan_out]
    for layer in layers:
        layer.__class__ = LoRALinear
    return len(layers)


@contextmanager
def folded(module: nn.Module) -> Iterator[None]:
    """Inside, float32 layers with a plain adapter use W + s B A, which is quicker; after it, W is what it was.

    Layers in bfloat16 are left as they are: the sum would be rounded. Training inside is not possible.
    """
    layers: list[tuple[Any, str, Any]] = [
        (layer, name, layer.base_layer.weight.data)
        for layer in module.modules()
        if isinstance(layer, LoRALinear) and layer.base_layer.weight.dtype == torch.float32
        if (name := layer.plain_adapter()) is not None
    ]
    try:
        for layer, name, weight in layers:
            layer.base_layer.weight.data = weight + layer.get_delta_weight(name)
            layer.merged_adapters.append(name)
        yield
    finally:
        for layer, _, weight in layers:
            layer.base_layer.weight.data = weight
            layer.merged_adapters.clear()
