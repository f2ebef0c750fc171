"""Memory of each of two processes: DDP copies the model, its gradients and its optimizer, FSDP spreads them.

    python benchmarks/sharding.py [result.json]

A language model of 26 million parameters in 12 layers, trained in full in float32 on the CPU; resident memory in the
third step, less that of the same run with a model of 0.3 million. Without sample answers and looks, for which all
weights are gathered, and with freed memory given back to the system.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import finish

SIZES = {
    size: f"{{hidden_size: {width}, num_hidden_layers: 12, num_attention_heads: 12, max_position_embeddings: 160}}"
    for size, width in (("large", 420), ("small", 48))
}
GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
STRATEGIES = {"one process": 1, "ddp": 2, "fsdp": 2}


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(strategy: str, size: str) -> list[float]:
    """Megabytes of each process."""
    number = STRATEGIES[strategy]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "eyespot", "train", "recipe=smoke", f"output_dir={folder}",
                   f"model.language.args={SIZES[size]}", f"trainer.devices={number}", "trainer.device=cpu",
                   f"trainer.strategy={strategy if number > 1 else 'auto'}", "trainer.epochs=100", "data.limit=64",
                   "trainer.batch_size=2", "trainer.log_every=1", "trainer.validate_every=1000",
                   "trainer.samples_every=1000", "trainer.checkpoint_every=1000", "evaluation.run=false",
                   "trainer.num_samples=0", "trainer.sight_every=0"]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **GIVE_BACK})
        assert process.stderr is not None
        assert any(line.startswith("step 3/") for line in process.stderr)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        found = [resident_mb(pid) for pid in (process.pid, *map(int, children))]
        process.kill()
        process.communicate()
    return found


def main() -> None:
    rows = []
    for strategy in STRATEGIES:
        large, small = (measure(strategy, size) for size in ("large", "small"))
        difference = [a - b for a, b in zip(large, small, strict=True)]
        print(f"{strategy:12} {'  '.join(f'{mb:7.0f} MB' for mb in difference)}", flush=True)
        rows.append({"strategy": strategy, "mb": difference})
    finish(rows)


if __name__ == "__main__":
    main()
