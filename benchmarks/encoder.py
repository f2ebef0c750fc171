"""EfficientNet-Lite with channel beside channel and padding inside the convolutions, beside plane behind plane and
padded copies: a step of training and a pass without gradients.

python benchmarks/encoder.py [FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import compare, finish
from torch import Tensor, nn
from torch.nn import functional as F

from eyespot.models.vision.efficientnet_lite import SamePadConv2d, build_efficientnet_lite

SIZE, BATCH = 160, 32
OURS = SamePadConv2d.forward


def padded(self: SamePadConv2d, input: Tensor) -> Tensor:
    """Planes stay planes, and every border is a copy."""
    height, width = (self._pad(input.shape[dim - 2], dim) for dim in (0, 1))
    return nn.Conv2d.forward(self, F.pad(input.contiguous(), (*width, *height)))


def main() -> None:
    torch.manual_seed(0)
    model = build_efficientnet_lite(image_size=SIZE, features="blocks", num_blocks=11, pretrained=False)
    pixels = torch.randn(BATCH, 3, SIZE, SIZE)

    def step() -> None:
        model.zero_grad()
        model(pixels).last_hidden_state.sum().backward()

    @torch.no_grad()
    def encode() -> None:
        model(pixels)

    def by(forward: Any, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            SamePadConv2d.forward = forward  # type: ignore[method-assign]
            work()

        return run

    what = f"EfficientNet-Lite0, 11 blocks, {BATCH} x {SIZE} pixels"
    works = {"step": step, "encode": encode}
    finish([compare(f"{name}: {what}", by(padded, work), by(OURS, work)) for name, work in works.items()])


if __name__ == "__main__":
    main()
