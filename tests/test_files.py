"""Folders appear whole or not at all, and whoever may read a folder may read the tensors in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eyespot.files import make_folder


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")


def test_a_folder_and_its_tensors_are_as_readable_as_any_other(tmp_path: Path) -> None:
    """safetensors alone would write a file that no other user, as in a container, may read."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    make_folder(tmp_path / "made", fill)
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "other").stat().st_mode
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "made" / name).stat().st_mode == (tmp_path / "other" / "file").stat().st_mode


def test_a_folder_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise ValueError("half done")

    with pytest.raises(ValueError, match="half done"):
        make_folder(tmp_path / "made", fail)
    assert list(tmp_path.iterdir()) == []


def test_the_first_one_wins(tmp_path: Path) -> None:
    make_folder(tmp_path / "made", fill)
    make_folder(tmp_path / "made", lambda folder: (folder / "late").touch())
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == ["config.json", "model.safetensors"]
