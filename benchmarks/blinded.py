"""A model that was made blind on purpose: does the verdict say so, and does a training?

    python benchmarks/blinded.py MODEL OUT [--limit 2000] [--steps 60]

MODEL is a trained model of recipe quickstart. Its connector is set to zero, so every picture says the same, and the
copy is evaluated with all controls (OUT/evaluation). Then the recipe trains from its start with such a connector,
frozen, for a few steps, and what its callback says is read from the run's record. OUT/blinded.json has both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import finish

import eyespot
from eyespot.cli import main as eyespot_command
from eyespot.training import run as run_module

TEST = ["format=easy_vqa", "split=test"]
BLIND = ["model.connector.train=frozen", "model.connector.calibrate=false"]
SIGHT_EVERY = 20


def zero(model: Any) -> None:
    """The connector gives zeros for whatever the encoder sees."""
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.zero_()


def evaluated(name: str, out: Path, limit: int) -> dict[str, Any]:
    """Scores and verdict of a blinded copy."""
    with tempfile.TemporaryDirectory() as folder:
        assistant = eyespot.load(name, "cpu")
        zero(assistant.model)
        assistant.model.save_pretrained(folder)
        assistant.processor.save_pretrained(folder)
        del assistant
        words = ["evaluate", folder, *TEST, "--limit", str(limit), "--batch-size", "128", "--out", str(out)]
        if eyespot_command(words):
            raise SystemExit("the evaluation failed")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {key: report[key] for key in ("accuracy", "interval", "verdict", "controls", "differences")}


def trained(steps: int) -> dict[str, Any]:
    """What the recipe says while it learns without pictures."""
    composed = run_module._composed

    def without_sight(*arguments: Any) -> tuple[Any, Any]:
        model, processor = composed(*arguments)
        zero(model)
        return model, processor

    run_module._composed = without_sight
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "recipe=quickstart", f"output_dir={folder}", f"trainer.max_steps={steps}", *BLIND,
            f"trainer.sight_every={SIGHT_EVERY}", "evaluation.run=false", "evaluation.pictures=0",
        ]  # fmt: skip
        result = run_module.train(run_module.compose_settings(overrides))
    return {"steps": steps, "looks": result.looks, "warnings": result.warnings}


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("model")
    words.add_argument("out", type=Path)
    words.add_argument("--limit", type=int, default=2000)
    words.add_argument("--steps", type=int, default=60)
    given = words.parse_args()
    rows = [
        {"name": "evaluation", **evaluated(given.model, given.out / "evaluation", given.limit)},
        {"name": "training", **trained(given.steps)},
    ]
    print(json.dumps(rows, indent=1))
    sys.argv[1:] = [str(given.out / "blinded.json")]
    finish(rows)
    if rows[0]["verdict"].startswith("sees") or not any(warning["kind"] == "sight" for warning in rows[1]["warnings"]):
        raise SystemExit("a blind model was not called blind")


if __name__ == "__main__":
    main()
