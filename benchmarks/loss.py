"""Head and cross-entropy in one chunked operation, beside full logits: forward and backward with a frozen head.

    python benchmarks/loss.py [result.json]

"every position" is what most code does: logits for all tokens of the batch; "supervised" already picks the labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import compare, finish

from eyespot.models.fused_loss import fused_cross_entropy

VOCABULARY, WIDTH = 262_144, 640  # Gemma-3-270M


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5
    rows = []
    for tokens, labelled in ((256, 50), (1024, 200)):
        hidden = torch.randn(tokens, WIDTH, requires_grad=True)
        places = torch.randperm(tokens)[:labelled].sort().values
        targets = torch.full((tokens,), -100)
        targets[places] = torch.randint(VOCABULARY, (labelled,))

        def everywhere(hidden: torch.Tensor = hidden, targets: torch.Tensor = targets) -> None:
            F.cross_entropy(hidden @ weight.t(), targets, reduction="sum").backward()

        def supervised(
            hidden: torch.Tensor = hidden, targets: torch.Tensor = targets, places: torch.Tensor = places
        ) -> None:
            F.cross_entropy(hidden[places] @ weight.t(), targets[places], reduction="sum").backward()

        def fused(
            hidden: torch.Tensor = hidden, targets: torch.Tensor = targets, places: torch.Tensor = places
        ) -> None:
            fused_cross_entropy(hidden[places], weight, None, targets[places]).backward()

        rows.append(compare(f"{labelled} labels: every position of {tokens}", everywhere, fused, repeats=5))
        rows.append(compare(f"{labelled} labels: supervised", supervised, fused, repeats=5))
    finish(rows)


if __name__ == "__main__":
    main()
