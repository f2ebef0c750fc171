"""Whole runs with ``data.streaming=true``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from eyespot.training.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``data.train`` with 40 questions about 12 pictures."""
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / "cache"))
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 255 - 20 * number, 99)).save(tmp_path / f"{number}.png")
    rows = [{"id": str(n), "image": f"{n % 12}.png", "question": f"what is {n}?", "answer": f"a{n}"} for n in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={{format: vqa, path: {tmp_path / 'q.jsonl'}}}"


def test_a_run_from_a_stream_equals_one_from_memory(run: Callable[..., Run], questions: str) -> None:
    common = [questions, "data.validation_share=0", "data.share=2",
              "model.language.tokenizer=bpe:280", "trainer.epochs=2",
              "evaluation.run=false", "evaluation.pictures=0"]  # fmt: skip
    memory = run("memory", *common)
    stream = run("stream", *common, "data.streaming=true")
    assert stream.curve == memory.curve
    one, other = ((r.model_folder / "model.safetensors").read_bytes() for r in (stream, memory))
    assert one == other


def test_two_processes_with_workers_killed_and_resumed(questions: str, tmp_path: Path) -> None:
    common = ["recipe=smoke", f"output_dir={tmp_path}", questions, "data.limit=40",
              "data.validation_share=0.2", "data.streaming=true", "trainer.epochs=4", "trainer.checkpoint_every=2",
              "trainer.log_every=1", "trainer.device=cpu", "trainer.num_workers=2", "trainer.devices=2",
              "trainer.batch_size=4", "evaluation.run=false", "evaluation.pictures=0"]  # fmt: skip

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-m", "eyespot", "train", *common, f"name={name}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    killed = start("killed")
    assert killed.stderr is not None
    assert any(line.startswith("step 3/") for line in killed.stderr)
    killed.kill()
    killed.communicate(timeout=120)
    for process in [start("whole"), start("killed")]:
        said = "".join(process.communicate(timeout=500))
        assert process.returncode == 0, said
    assert "going on from" in said
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    records = [json.loads((tmp_path / name / "model" / "training.json").read_text()) for name in ("whole", "killed")]
    assert records[0]["samples"] == records[1]["samples"] and records[0]["curve"] == records[1]["curve"]
