"""What was planned beside what a run measured."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eyespot.config import TrainSettings, to_dict
from eyespot.files import default_cache
from eyespot.plan.devices import HERE
from eyespot.plan.make import Plan
from eyespot.plan.show import shown_hours, table
from eyespot.training.run import Run, write_json


def remember(plan: Plan, settings: TrainSettings) -> Path:
    """Keep a plan for the run of the same settings."""
    file = _file(settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, plan.to_dict())
    return file


def remembered(settings: TrainSettings) -> dict[str, Any] | None:
    """The plan that was made for these settings, if there is one."""
    file = _file(settings)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _file(settings: TrainSettings) -> Path:
    """By all that decides on the training; a run of another name is the same."""
    values = {key: value for key, value in to_dict(settings).items() if key in ("model", "data", "trainer", "stages")}
    text = json.dumps(values, sort_keys=True)
    return default_cache() / "plan" / f"run-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def measured(run: Run) -> dict[str, float]:
    """Of a run that is just over: samples a second, seconds of training, and bytes at the peak of this process (of a
    GPU: what torch had in use there)."""
    device = run.assistant.device if run.assistant is not None else torch.device("cpu")
    peak = float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else process_peak()
    return {"samples_per_s": run.samples / max(run.seconds, 1e-9), "seconds": run.seconds, "peak_bytes": peak}


def process_peak() -> float:
    """Bytes of this process at most; NaN where the system does not say."""
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def compare(run: Run, settings: TrainSettings, console: Console, trained: bool = True) -> None:
    """Print what was planned for a run and what it measured.

    Args:
        settings: as they were given, before anything was decided for this machine.
        trained: in this process, so that its peak is that of the training.
    """
    found = measured(run)
    plan = remembered(settings)
    here = [e for stage in (plan or {"stages": []})["stages"] for e in stage["estimates"] if e["device"] == HERE]
    rows = [
        ("samples/s", f"{found['samples_per_s']:,.4g}"),
        ("training", shown_hours(found["seconds"] / 3600)),
        ("peak GB", f"{found['peak_bytes'] / 1e9:.2f}" if trained else "not known"),
    ]
    if plan is None or not here:
        console.print(
            "measured; `eyespot plan` with the same settings says it beforehand", markup=False, soft_wrap=True
        )
        console.print(table("", ("", "run"), rows))
        return
    samples = sum(stage["samples"] for stage in plan["stages"])
    seconds = sum(stage["samples"] / e["samples_per_s"] for stage, e in zip(plan["stages"], here, strict=True))
    peak = max(e["memory_gb"] for e in here)
    planned = (f"{samples / seconds:,.4g}", shown_hours(seconds / 3600), f"{peak:.2f} of tensors")
    lines = [(name, plan_value, value) for (name, value), plan_value in zip(rows, planned, strict=True)]
    console.print(table("planned and measured", ("", "plan", "run"), lines))
