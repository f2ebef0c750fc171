"""The benchmark for GPUs runs on any machine with toy sizes; what it measures there means nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def test_gpu_script_with_toy_sizes(tmp_path: Path) -> None:
    result = run("--tiny", "--no-compile", "--batches", "1", "3", "--out", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    switches = {row["switches"] for row in report["rows"] if row["model"].startswith("A")}
    assert len(switches) == 5 and {row["batch"] for row in report["rows"]} == {1, 3}
    assert all(row["samples_per_s"] > 0 and row["share_of_ceiling"] > 0 for row in report["rows"])


def test_gpu_script_says_that_it_needs_one() -> None:
    result = run()
    assert result.returncode == 1 and "no CUDA GPU here; --tiny runs" in result.stderr
