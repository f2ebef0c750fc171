"""Which device to compute on, and whether bfloat16 is the fast path there."""

from __future__ import annotations

import os

import torch

BFLOAT16 = "EYESPOT_CPU_BFLOAT16"


def choose_device(device: str = "auto") -> torch.device:
    """ "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: the device that was asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    kind = device.partition(":")[0]
    if not available.get(kind, False):
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ValueError(f"device {device!r} is not available on this machine; available: {there}")
    return torch.device(device)


def has_fast_bfloat16(device: torch.device) -> bool:
    """True where matrix products in bfloat16 are faster than in float32.

    On CPUs that takes AMX or AVX512-BF16 instructions; without them torch emulates bfloat16, several times slower than
    float32 (measured: docs/log.md). The environment variable EYESPOT_CPU_BFLOAT16 (0 or 1) decides instead, so that
    different processors compute alike.

    Raises:
        ValueError: the variable has another value.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        if (said := os.environ.get(BFLOAT16, "")) not in ("", "0", "1"):
            raise ValueError(f"{BFLOAT16} is {said!r}; set it to 0 or 1, or not at all")
        if said:
            return said == "1"
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False
