"""Losses over pairs are those of the whole batch, whoever has its rows: two processes give the weights of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from drawn import draw_captions
from eyespot.training.run import compose_settings, train
from started import said_by, tasks

pytestmark = pytest.mark.filterwarnings("ignore")
RATES = "trainer.lr={vision: 2e-3, connector: 2e-3, language: 2e-3, alignment: 2e-3, detection: 2e-3}"
COMMON = ["recipe=smoke", "data.test=null", "data.limit=null", "data.validation_share=0.2", "evaluation.run=false",
          "data.share=1", "trainer.checkpoint_every=2", "trainer.eps=1e-2", "trainer.max_steps=3", RATES]  # fmt: skip
QFORMER = [
    "connector=qformer",
    "model.connector.args={num_queries: 4, hidden_dim: 32, depth: 2, heads: 2, dropout: 0.0}",
    "model.alignment={dim: 16, max_text: 24, tokenizer: byte}",
]
LANGUAGE = ["model.alignment={dim: 16, max_text: 24}"]
ALL = "losses: {contrastive: 1.0, sigmoid: 0.1, matching: 1.0, caption: 1.0}"


def stages(language: str) -> str:
    look = (
        ", {name: look, kind: detect, train: {vision: full, connector: full, detection: full}, data: {train: {format: "
        "scenes, num_scenes: 26, image_size: 32, questions: [detect]}}}"
    )
    joint = f"train: {{vision: full, connector: full, alignment: full, language: {language}}}"
    return (
        f"stages=[{{name: joint, kind: joint, {joint}, {ALL}, data: {{validation_share: 0.0}}, "
        "trainer: {max_steps: 4}}, "
        "{name: compare, kind: contrastive, train: {connector: full, alignment: full}}, "
        f"{{name: align, kind: align, train: {{connector: full}}}}{look if language == 'full' else ''}]"
    )


@pytest.mark.parametrize(
    ("side", "language"), [pytest.param(QFORMER, "frozen", id="qformer"), pytest.param(LANGUAGE, "full", id="language")]
)
def test_two_processes_give_the_weights_of_one(tmp_path: Path, side: list[str], language: str) -> None:
    """Negatives and names come from all rows; some rows repeat pictures and words; and a broken picture, which the
    first stage meets in the batch, leaves the processes with unequal numbers of rows."""
    file = draw_captions(tmp_path / "drawn")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0], lines[1]]) + "\n")
    (tmp_path / "drawn" / "7.png").write_bytes(b"\x89PNG no")
    common = [
        *COMMON,
        f"data.train={{format: captions, path: {file}}}",
        *side,
        stages(language),
        f"output_dir={tmp_path}",
    ]
    with Path(os.devnull).open("w") as nowhere:
        one = train(compose_settings([*common, "name=one", "trainer.batch_size=8"]), console=Console(file=nowhere))
    two = ["name=two", "trainer.batch_size=4", "trainer.devices=2", "trainer.device=cpu"]
    said = said_by(tasks("train", *common, *two))
    assert said.count(f"stage 2 of {len(record(tmp_path / 'one'))}") == 1
    weights = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name, tensor in load_file(one.model_folder / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    for ours, theirs in zip(record(tmp_path / "one"), record(tmp_path / "two"), strict=True):
        for curve in ("curve", "validation"):
            assert [v for _, v in ours[curve]] == pytest.approx([v for _, v in theirs[curve]], rel=1e-4)
        assert ours["samples"] == theirs["samples"]
        assert ours["measured"] == pytest.approx(theirs["measured"], rel=1e-4)
    assert record(tmp_path / "one")[0]["samples"] == 25  # of 26
    assert record(tmp_path / "two")[1]["validation"] and record(tmp_path / "two")[1]["retrieval"]["num_images"] == 5


def record(folder: Path) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = json.loads((folder / "model" / "training.json").read_text())["stages"]
    return stages
