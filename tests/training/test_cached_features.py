"""I8 in a run: a frozen encoder's features come from the disk, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eyespot.training.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_whole_run(run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / "cache"))
    common = ["model.vision.train=frozen", "trainer.epochs=2", "trainer.eps=1e-2"]
    plain = run("plain", *common, "data.cache_features=false")
    assert not (tmp_path / "cache" / "features").exists()
    cached = run("cached", *common)
    again = run("again", *common, "trainer.num_workers=1")
    assert len(list((tmp_path / "cache" / "features").glob("*/*.safetensors"))) == 1
    assert [loss for _, loss in cached.curve] == pytest.approx([loss for _, loss in plain.curve], rel=1e-5)
    assert again.curve == cached.curve and again.validation == cached.validation
    for (name, a), b in zip(
        load_file(plain.model_folder / "model.safetensors").items(),
        load_file(cached.model_folder / "model.safetensors").values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_learning_encoder_is_never_cached(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / "cache"))
    run("learning", "trainer.max_steps=1")
    assert not (tmp_path / "cache" / "features").exists()


def test_features_that_do_not_fit_are_computed_in_the_step(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / "cache"))
    result = run("small", "model.vision.train=frozen", "trainer.max_steps=1", "data.cache_gb=1e-6")
    assert result.finished and not list((tmp_path / "cache" / "features").glob("*/*.safetensors"))


def test_unreadable_pictures_are_left_out_and_named(run: Callable[..., Run], tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no")
    rows = [{"id": n, "image": f"{n}.png", "question": "what?", "answer": "red"} for n in ("good", "bad")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{format: vqa, path: {tmp_path / 'q.jsonl'}}}"
    result = run("bad", f"data.train={source}", "data.validation_share=0", "model.vision.train=frozen",
                 "trainer.max_steps=1")  # fmt: skip
    assert result.finished and result.samples == 1
