"""Runs of the smoke recipe, shrunk further; each test gets folders of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from eyespot.training.run import Run, compose_settings, train

# What the libraries below say of themselves, and that we cannot avoid
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """``run("name", "trainer.lr...=...")`` trains the smoke recipe quietly and returns the Run."""

    def start(name: str, *overrides: str, **options: object) -> Run:
        settings = compose_settings(
            [
                "recipe=smoke",
                f"name={name}",
                f"output_dir={tmp_path}",
                "data.limit=40",
                "data.validation_share=0.2",
                *overrides,
            ]
        )
        with Path(os.devnull).open("w") as nowhere:
            return train(settings, console=Console(file=nowhere), **options)  # type: ignore[arg-type]

    return start
