"""I6 over processes: two with half the batch each give the weights of one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eyespot.training.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")
COMMON = ["data.limit=40", "data.validation_share=0.2", "data.share=1", "trainer.max_steps=3", "trainer.eps=1e-2",
          "trainer.checkpoint_every=2", "evaluation.run=false"]  # fmt: skip


def test_two_processes_give_the_weights_of_one(run: Callable[..., Run], tmp_path: Path) -> None:
    one = run("one", *COMMON, "trainer.batch_size=8")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "eyespot",
        "train",
        "recipe=smoke",
        "name=two",
        f"output_dir={tmp_path}",
    ]
    command += [*COMMON, "trainer.batch_size=4", "trainer.devices=2", "trainer.device=cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name, tensor in load_file(one.model_folder / "model.safetensors").items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert "step 2/3" in done.stderr and done.stderr.count("step 2/3") == 1
    assert [path.name for path in sorted((tmp_path / "two" / "checkpoints").iterdir())][-1] == "step-0000003"
