"""What `eyespot plan` says beside what runs on this machine measure: parameters, FLOPs, memory, and time.

    python benchmarks/plan.py result.json              # parameters, FLOPs and memory of eight real steps
    python benchmarks/plan.py result.json --time       # samples a second, on a machine that does nothing else
    python benchmarks/plan.py result.json --cases smoke scratch_tiny

Every case is planned and run in a process of its own, one after the other, so the ten-second probe and the run that it
is compared with see the same machine. The run is `eyespot.training.run.train`, after a first tiny run that imports and
initialises everything.

- Parameters: of the model that was built. FLOPs: torch's FlopCounterMode around whole training steps.
- Memory: the bytes of the weights, and what the resident size rises by from the beginning of training to its highest
  (VmHWM, reset at the beginning) until the sixth step. So tokenizer, samples and libraries do not count, and compiled
  kernels do. Freed memory is given back to the system (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_), so that what is
  resident is what is used.
- Time: the median of the run's own samples_per_s, each over four steps, the first four left out.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUIET = [
    "evaluation.run=false", "evaluation.pictures=0", "trainer.samples_every=1000000", "trainer.sight_every=0",
    "trainer.validate_every=1000000", "trainer.checkpoint_every=1000000", "trainer.log_every=4", "trainer.device=cpu",
    "logger.tensorboard=false",
]  # fmt: skip
FULL = ["model.language.train=full", "model.language.lora=null"]
FEW = "data.limit=600"
GPT_BASE = ["recipe=scratch_222m", "data=easy_vqa", "trainer.precision=fp32", FEW, "model.language.tokenizer=byte"]
SCENES = ["recipe=scenes", "trainer.devices=1", "stages.0.data.train.num_scenes=400"]
CASES: dict[str, list[str]] = {
    "smoke": ["recipe=smoke"],
    "scratch_tiny, batch 48": ["recipe=scratch_tiny", "data.limit=3000"],
    "scratch_tiny, batch 12": ["recipe=scratch_tiny", "data.limit=3000", "trainer.batch_size=12"],
    "quickstart": ["recipe=quickstart", FEW, "trainer.epochs=1"],
    "quickstart, encoder in every step": ["recipe=quickstart", FEW, "trainer.epochs=1", "data.cache_features=false"],
    "quickstart, unpacked, batch 12": ["recipe=quickstart", FEW, "data.packing=false", "trainer.batch_size=12"],
    "quickstart, Gemma in full, batch 12": ["recipe=quickstart", FEW, *FULL, "trainer.batch_size=12"],
    "scratch_222m, batch 2": [*GPT_BASE, "trainer.batch_size=2"],
    "scratch_222m, batch 4, checkpointing": [
        *GPT_BASE, "trainer.batch_size=4", "trainer.gradient_checkpointing=true",
    ],
    "scenes": SCENES,
}  # fmt: skip
NUM_STEPS = {"count": 8, "time": 24}
MEMORY_STEPS, WARM_UP = 6, 1


def resident(field: str = "VmRSS") -> float:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * float(next(line.split()[1] for line in lines if line.startswith(field)))


def give_back() -> None:
    """What was freed, to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Watch:
    """What a run does between the beginning of a training and its end; one entry for each stage."""

    def __init__(self, mode: str) -> None:
        self.mode, self.peak, self.start = mode, 0.0, 0.0
        self.stages: list[dict[str, Any]] = []
        self.flops: list[float] = []
        self.samples: list[int] = []

    def attach(self) -> None:
        """Around the steps of whatever is trained in this process from now on."""
        from eyespot.plan.trace import bytes_of
        from eyespot.training.callbacks import Reporter
        from eyespot.training.module import VLMModule

        step, start, end = VLMModule.training_step, Reporter.on_train_start, Reporter.on_train_end
        watch = self

        def training_step(module: Any, window: Any, index: int) -> None:
            if watch.mode == "time" or module.global_step < MEMORY_STEPS:
                step(module, window, index)
                watch.peak = resident("VmHWM")
                return
            from torch.utils.flop_counter import FlopCounterMode

            from eyespot.plan.trace import CPU_ATTENTION

            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                step(module, window, index)
            watch.flops.append(float(counter.get_total_flops()))
            watch.samples.append(len(window.ids))

        def on_train_start(reporter: Any, trainer: Any, module: Any) -> None:
            watch.flops, watch.samples = [], []
            give_back()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            watch.start = resident() - bytes_of((*module.model.parameters(), *module.model.buffers()))
            start(reporter, trainer, module)

        def on_train_end(reporter: Any, trainer: Any, module: Any) -> None:
            end(reporter, trainer, module)
            parameters = list(module.model.parameters())
            watch.stages.append(
                {
                    "bytes": watch.peak - watch.start,
                    "flops": sum(watch.flops) / max(1, sum(watch.samples)),
                    "folder": trainer.default_root_dir,
                    "parameters": sum(p.numel() for p in parameters),
                    "trainable": sum(p.numel() for p in parameters if p.requires_grad),
                }
            )

        around = {"on_train_start": on_train_start, "on_train_end": on_train_end}
        for owner, methods in ((VLMModule, {"training_step": training_step}), (Reporter, around)):
            for name, method in methods.items():
                setattr(owner, name, method)


def with_steps(words: list[str], steps: int) -> list[str]:
    """The overrides with so many steps, in every stage if there are some."""
    from eyespot.training.run import compose_settings

    number = len(compose_settings(words).stages or [])
    limits = [f"stages.{i}.trainer.max_steps={steps}" for i in range(number)] or [f"trainer.max_steps={steps}"]
    return [*words, *limits]


def one(case: str, mode: str) -> list[dict[str, Any]]:
    """Plan and run a case; a row for the run, or for each of its stages."""
    from rich.console import Console

    from eyespot.plan import make_plan
    from eyespot.training.run import compose_settings, train

    warnings.filterwarnings("ignore")
    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        quiet = [*QUIET, f"output_dir={folder}"]
        train(compose_settings(["recipe=smoke", "name=first", *quiet]), console=console)
        settings = compose_settings(with_steps([*CASES[case], *quiet], NUM_STEPS[mode]))
        seconds = 10.0 if mode == "time" else 0.0
        plan = make_plan(settings, ["here"], seconds=seconds, fresh=mode == "time", switches=False)
        watch = Watch(mode)
        watch.attach()
        train(settings, console=console)
        names = [f"{case}, {stage.name}" for stage in plan.stages] if settings.stages else [case]
        described = described_time if mode == "time" else described_counts
        found = zip(names, plan.stages, watch.stages, strict=True)
        return [{"case": name, **described(stage, measured)} for name, stage, measured in found]


def described_counts(stage: Any, measured: dict[str, Any]) -> dict[str, Any]:
    total, trainable = stage.parameters["model"]
    gflop = sum(value for place, value in stage.profiles[0].gflop.items() if "once" not in place)
    return {
        "parameters": pair(total, measured["parameters"]),
        "trainable": pair(trainable, measured["trainable"]),
        "gflop_per_sample": pair(gflop, measured["flops"] / 1e9),
        "memory_gb": pair(stage.profiles[0].memory["total"] / 1e9, measured["bytes"] / 1e9),
    }


def described_time(stage: Any, measured: dict[str, Any]) -> dict[str, Any]:
    with (Path(measured["folder"]) / "logs" / "csv" / "metrics.csv").open(encoding="utf-8") as file:
        rates = [float(line["samples_per_s"]) for line in csv.DictReader(file) if line.get("samples_per_s")]
    return {"samples_per_s": pair(stage.estimates[0].samples_per_s, statistics.median(rates[WARM_UP:]))}


def pair(planned: float, measured: float) -> dict[str, float]:
    return {"planned": planned, "measured": measured, "ratio": planned / measured}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--time", action="store_true")
    arguments.add_argument("--cases", nargs="+", default=list(CASES))
    arguments.add_argument("--one", help="run this case here; used by the script itself")
    given = arguments.parse_args()
    mode = "time" if given.time else "count"
    if given.one:
        given.out.write_text(json.dumps(one(given.one, mode)), encoding="utf-8")
        return
    report = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {"rows": []}
    rows = {row["case"]: row for row in report["rows"]}
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    for case in given.cases:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            words = [sys.executable, __file__, str(file), "--one", case, *(["--time"] if given.time else [])]
            subprocess.run(words, check=True, env={**os.environ} if given.time else environment)
            for found in json.loads(file.read_text(encoding="utf-8")):
                rows[found["case"]] = {**rows.get(found["case"], {}), **found}
                print(json.dumps(found), flush=True)
        from harness import processor

        report = {
            "command": f"python benchmarks/plan.py {given.out.name}; the same with --time",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": f"{processor()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
            "versions": {
                "python": platform.python_version(),
                **{p: version(p) for p in ("torch", "transformers", "peft")},
            },
            "rows": list(rows.values()),
        }
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
