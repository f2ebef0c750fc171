"""Filters, mixtures and augmentation in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from eyespot.config import ConfigError
from eyespot.training.run import Run, compose_settings, fill_features

pytestmark = pytest.mark.filterwarnings("ignore")

AUGMENTED = "data.augment={crop: {spare: []}, color: {}}"
MIXED = "data.train={a: {format: easy_vqa, split: train, weight: 3}, b: {format: easy_vqa, split: test, weight: 1}}"


def losses(run: Run) -> list[float]:
    return [loss for _, loss in run.curve]


def test_augmentation_changes_what_is_learned_and_the_same_run_repeats_it(run: Callable[..., Run]) -> None:
    plain, augmented, again = run("plain"), run("augmented", AUGMENTED), run("again", AUGMENTED)
    assert losses(augmented) == losses(again) != losses(plain)


def test_augmented_pictures_are_not_cached(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / "cache"))
    frozen = ["model.vision.train=frozen", "trainer.max_steps=2", "trainer.precision=fp32"]
    augmented = run("augmented", AUGMENTED, *frozen)
    assert not list((tmp_path / "cache").glob("features/*"))
    plain = run("plain", *frozen)
    assert list((tmp_path / "cache").glob("features/*"))
    assert losses(augmented) != losses(plain)
    with pytest.raises(ConfigError, match=r"only features of pictures that stay can be kept, with data\.augment=\{\}"):
        fill_features(compose_settings(["recipe=smoke", AUGMENTED]), console=None)  # type: ignore[arg-type]


def test_a_run_says_what_it_filters_and_mixes(run: Callable[..., Run]) -> None:
    result = run("mixed", MIXED, "data.filters={text_length: {max_chars: 8}}", "trainer.max_steps=2")
    assert result.finished
    lines = [json.loads(line) for line in (result.folder / "dropped.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"answer has more than 8 characters"}
    assert {line["id"].split("/")[0] for line in lines} <= {"a", "b"} and lines
    report = (result.folder / "data_report.txt").read_text()
    assert report.startswith(f"{40 - len(lines)} accepted, {len(lines)} rejected\n")
    assert json.loads((result.folder / "settings.json").read_text())["data"]["filters"] == {
        "text_length": {"max_chars": 8}
    }


@pytest.mark.parametrize("override", ["data.filters={text_size: {}}", "data.augment={flip: {chance: 1}}"])
def test_wrong_settings_stop_before_anything_is_loaded(override: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown data filter 'text_size'|takes no argument 'chance'"):
        compose_settings(["recipe=smoke", override])
