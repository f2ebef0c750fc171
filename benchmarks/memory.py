"""Peak memory of head and loss by size of the vocabulary, beyond the head itself: full logits, and in chunks.

    python benchmarks/memory.py [result.json]

Forward and backward of 512 supervised tokens of width 640 under a frozen head; each figure from a process of its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from harness import finish

from eyespot.models.fused_loss import fused_cross_entropy

VOCABULARIES = (32_768, 131_072, 262_144)
TOKENS, WIDTH = 512, 640


def peak_mb(vocabulary: int, kind: str) -> float:
    """By how much the largest resident size of this process rises in one forward and backward."""
    weight = torch.ones(vocabulary, WIDTH).mul_(0.01)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(vocabulary, (TOKENS,))
    (hidden[:4] @ weight[:64].t()).sum().backward()  # the library's own buffers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "full":
        F.cross_entropy(hidden @ weight.t(), targets, reduction="sum").backward()
    else:
        fused_cross_entropy(hidden, weight, None, targets).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    if len(sys.argv) == 4:
        print(peak_mb(int(sys.argv[2]), sys.argv[3]))
        return
    rows = []
    for vocabulary in VOCABULARIES:
        command = [sys.executable, __file__, "measure", str(vocabulary)]
        full, chunked = (
            float(subprocess.run([*command, kind], capture_output=True, text=True, check=True).stdout)
            for kind in ("full", "chunked")
        )
        print(f"{vocabulary:8,} words: full logits {full:7.0f} MB   in chunks {chunked:7.0f} MB", flush=True)
        rows.append({"vocabulary": vocabulary, "full_mb": full, "chunked_mb": chunked})
    finish(rows)


if __name__ == "__main__":
    main()
