"""The head of a large vocabulary on few rows on a CPU: with the weight on the left, beside the usual order.

    python benchmarks/head.py [result.json]

A step of generation has a row for each answer, a training step on a few questions one for each learned token.
"""

from __future__ import annotations

import torch
from harness import compare, finish

from eyespot.models.head import FEW_ROWS, head_product

VOCABULARY, WIDTH = 262_144, 640  # Gemma-3-270M


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5
    rows = []
    for number in (FEW_ROWS[0], 8, 13, 16, 24, FEW_ROWS[-1]):
        states = torch.randn(number, WIDTH)

        def usual(states: torch.Tensor = states) -> torch.Tensor:
            return torch.nn.functional.linear(states, weight)

        def ours(states: torch.Tensor = states) -> torch.Tensor:
            return head_product(states, weight)

        torch.testing.assert_close(usual(), ours(), rtol=1e-5, atol=1e-5)
        rows.append(compare(f"{number} rows", usual, ours, repeats=9))
    finish(rows)


if __name__ == "__main__":
    main()
