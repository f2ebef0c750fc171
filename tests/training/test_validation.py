"""Validation data of its own: what is measured on it, and that no picture of it was learned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from eyespot.config import ConfigError
from eyespot.training.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")


def questions(folder: Path, colors: list[str]) -> str:
    folder.mkdir()
    rows = []
    for color in colors:
        Image.new("RGB", (9, 9), color).save(folder / f"{color}.png")
        rows.append(json.dumps({"image": f"{color}.png", "question": "what?", "answer": color}))
    (folder / "q.jsonl").write_text("\n".join(rows))
    return f"{{format: vqa, path: {folder / 'q.jsonl'}}}"


def test_it_takes_the_place_of_a_share(run: Callable[..., Run], tmp_path: Path) -> None:
    train, held_out = questions(tmp_path / "a", ["red", "green"]), questions(tmp_path / "b", ["blue"])
    result = run("own", f"data.train={train}", f"data.validation={held_out}", "trainer.epochs=2")
    assert result.samples == 4 and len(result.validation) == 1
    other = run(
        "other", f"data.train={train}", f"data.validation={questions(tmp_path / 'c', ['teal'])}", "trainer.epochs=2"
    )
    assert other.curve == result.curve and other.validation != result.validation


def test_a_picture_on_both_sides_is_an_error_whatever_it_is_called(run: Callable[..., Run], tmp_path: Path) -> None:
    train = questions(tmp_path / "a", ["red", "green"])
    held_out = questions(tmp_path / "b", ["blue"])
    shutil.copy(tmp_path / "a" / "red.png", tmp_path / "b" / "blue.png")
    with pytest.raises(ValueError, match="1 of 1 validation pictures are also training pictures"):
        run("both", f"data.train={train}", f"data.validation={held_out}")
    with pytest.raises(ConfigError, match=r"data\.validation\.format is missing"):
        run("none", "data.validation={path: x.jsonl}")
