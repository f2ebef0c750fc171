"""Two ways to do the same work, timed in turns in one run."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, naive: Callable[[], object], ours: Callable[[], object], repeats: int = 7) -> dict[str, Any]:
    """Median seconds of both and their ratio; one warm-up each, then in turns, so that a slow moment meets both."""
    naive()
    ours()
    times = [(seconds(naive), seconds(ours)) for _ in range(repeats)]
    theirs, own = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{name:48} naive {theirs * 1e3:9.1f} ms   ours {own * 1e3:9.1f} ms   ratio {theirs / own:5.2f}", flush=True)
    return {"name": name, "naive_s": theirs, "ours_s": own, "ratio": theirs / own, "times": times}


def finish(rows: list[dict[str, Any]]) -> None:
    """Write the rows, hardware and versions to the file named on the command line, if there is one."""
    if len(sys.argv) < 2:
        return
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    report = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "peft")}},
        "rows": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """The model name of the CPU, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
