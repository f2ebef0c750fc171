"""Rented GPUs: what their makers and renters state, and how long a step may take there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from eyespot.plan.trace import Call

# assumed, not measured: shares of the stated rates that small models reach, and what one operation costs Python
PRODUCTS_SHARE = 0.5
BANDWIDTH_SHARE = 0.7
HOST_S = 6e-6
KERNEL_S = 3e-6
UPDATE_BYTES = 36  # of clipping and AdamW for each parameter: four numbers read, three written, two for the norm
USABLE_SHARE = 0.92  # of the memory: the rest is CUDA's own, and lost between blocks


@dataclass(frozen=True)
class Device:
    """flops: dense bfloat16, a second. memory_gb: in 1e9 bytes. bandwidth: bytes a second. price: dollars an hour on
    demand, without commitment. sources: of the first three, and of the price with the day on which it was read."""

    name: str
    flops: float
    memory_gb: float
    bandwidth: float
    price: float | None
    specification: str
    price_source: str

    @property
    def usable_bytes(self) -> float:
        return USABLE_SHARE * self.memory_gb * 1e9

    def step_seconds(self, calls: Sequence[Call], num_ops: float, trainable: int) -> float:
        """Of a step: the slower of the GPU, operation by operation, and of Python that launches them."""
        update = UPDATE_BYTES * trainable / (self.bandwidth * BANDWIDTH_SHARE)
        kernels = sum(call.count * self._kernel_seconds(call) for call in calls)
        return max(kernels, num_ops * HOST_S) + update

    def _kernel_seconds(self, call: Call) -> float:
        half = call.dtype in (torch.bfloat16, torch.float16)
        peak = self.flops if half else self.flops / 2  # TF32, which eyespot sets for products in float32
        return max(call.flops / (peak * PRODUCTS_SHARE), call.num_bytes / (self.bandwidth * BANDWIDTH_SHARE), KERNEL_S)


NVIDIA = "https://www.nvidia.com/en-us/data-center"
DEVICES = {
    device.name: device
    for device in (
        Device("A10", 125e12, 24, 600e9, 0.86, f"{NVIDIA}/products/a10-gpu/",
               "Lambda, 2026-05-07, https://techbytes.app/posts/serverless-gpu-pricing-matrix-modal-replicate-lambda-2026/"),
        Device("A100-40", 312e12, 40, 1555e9, 1.99, f"{NVIDIA}/a100/", "Lambda, 2026-09-20, https://lambda.ai/instances"),
        Device("A100-80", 312e12, 80, 2039e9, 1.79, f"{NVIDIA}/a100/",
               "RunPod secure, 2026-11-09, https://www.runpod.io/pricing"),
        Device("H100", 989e12, 80, 3350e9, 3.99, f"{NVIDIA}/h100/",
               "RunPod secure, 2026-11-09, https://www.runpod.io/pricing"),
        Device("H200", 989e12, 141, 4800e9, 4.59, f"{NVIDIA}/h200/",
               "RunPod secure, 2026-10-07, https://www.runpod.io/pricing"),
    )
}  # fmt: skip
HERE = "here"


def choose(names: Sequence[str]) -> list[Device | None]:
    """Devices by name, ``NAME=DOLLARS`` with another price; None is this machine ("here").

    Raises:
        ValueError: an unknown name, or a price that is no number.
    """
    chosen: list[Device | None] = []
    for name in dict.fromkeys(names):
        key, equals, price = name.partition("=")
        if key == HERE and not equals:
            chosen.append(None)
            continue
        if key not in DEVICES:
            raise ValueError(f"unknown device {name!r}; choose {HERE}, {', '.join(DEVICES)}, or NAME=DOLLARS_AN_HOUR")
        device = DEVICES[key]
        if equals:
            try:
                device = replace(device, price=float(price), price_source="given")
            except ValueError as error:
                raise ValueError(f"the price of {name!r} is no number; write {key}=1.29") from error
        chosen.append(device)
    return chosen
