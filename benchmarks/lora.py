"""An adapted linear layer as one operation, beside peft's: forward and backward at the sizes of Gemma-3-270M.

python benchmarks/lora.py [result.json]
"""

from __future__ import annotations

import torch
from harness import compare, finish
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from eyespot.models.lora_linear import fuse

SIZES = ((640, 2048), (2048, 640), (640, 1024), (640, 256))
TOKENS = (256, 2048)


def layer(width_in: int, width_out: int, *, fused: bool) -> nn.Module:
    """A frozen layer with a trained adapter."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(width_in, width_out, bias=False))
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=["0"]), holder)
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if fused:
        fuse(holder)
    return holder


def main() -> None:
    rows = []
    for tokens in TOKENS:
        for size in SIZES:
            plain, fused = layer(*size, fused=False), layer(*size, fused=True)
            x = torch.randn(tokens, size[0], requires_grad=True)

            def step(module: nn.Module, x: torch.Tensor = x) -> None:
                module(x).sum().backward()

            rows.append(compare(f"{tokens} tokens, {size[0]} -> {size[1]}, r 16",
                                lambda m=plain: step(m), lambda m=fused: step(m), repeats=21))  # fmt: skip
    finish(rows)


if __name__ == "__main__":
    main()
