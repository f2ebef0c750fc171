"""Speed of matrix products by dtype: is bfloat16 the fast path on this machine?

    python benchmarks/matmul.py

Prints GFLOP/s (2 x M x K x N operations) at the sizes of Gemma-3-270M's layers, and what eyespot decides.
"""

from __future__ import annotations

import time

import torch

from eyespot.devices import choose_device, has_fast_bfloat16

SIZES = ((256, 640, 2048), (2304, 640, 2048), (128, 640, 262144))


def rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """GFLOP/s of [M, K] x [K, N], repeated for about so many seconds after one warm-up."""
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)

    def product() -> None:
        torch.nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()

    product()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        product()
        count += 1
    return 2e-9 * m * k * n * count / (time.perf_counter() - start)


def main() -> None:
    device = choose_device()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for size in SIZES:
        exact, half = (rate(*size, dtype, device) for dtype in (torch.float32, torch.bfloat16))
        print(f"{size}: float32 {exact:,.0f} GFLOP/s, bfloat16 {half:,.0f} GFLOP/s, ratio {half / exact:.2f}")
    print(f"bfloat16 is used by default: {has_fast_bfloat16(device)}")


if __name__ == "__main__":
    main()
