"""Adapters added to the weights: the same answers from a folder without adapters, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import eyespot
from eyespot.export.parity import export_model
from eyespot.inference import Assistant


def test_merged(assistant_of: Callable[..., Assistant], tmp_path: Path) -> None:
    assistant = assistant_of("clip", "llama", lora=True)
    before = {name: tensor.clone() for name, tensor in assistant.model.state_dict().items()}
    found = export_model(assistant, "merged", tmp_path / "out")
    assert 0 < found.largest_difference < 1e-4
    loaded = eyespot.load(tmp_path / "out", "cpu")
    assert loaded.model.config.lora is None and not any("lora" in name for name in loaded.model.state_dict())
    after = assistant.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    base = loaded.model.state_dict()["language.model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(base, before["language.model.layers.0.self_attn.q_proj.base_layer.weight"])
