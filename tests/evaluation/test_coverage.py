"""In simulation intervals hold the truth as often as they say, and the test finds no more than it may."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eyespot.evaluation.metrics import cluster_bootstrap, paired_bootstrap, paired_test

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
RESULTS = SCRIPT.parent / "results" / "2026-11-21-coverage.json"


@pytest.fixture(scope="module")
def shares() -> dict[str, float]:
    """Of 1,000 data sets of 150 pictures; the standard error of a share of 95% is 0.7%."""
    spec = importlib.util.spec_from_file_location("simulated_coverage", SCRIPT)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.shares(150, accuracy=0.6, num_sets=1000, num_draws=300)  # type: ignore[no-any-return]


@pytest.mark.parametrize("interval", ["mean", "difference"])
def test_intervals_of_95_percent_hold_the_truth_in_95_percent(shares: dict[str, float], interval: str) -> None:
    assert 0.93 <= shares[f"{interval} by picture"] <= 0.97
    assert shares[f"{interval} by question"] < 0.92  # the mistake that taking pictures whole avoids


def test_equal_models_are_told_apart_in_5_percent(shares: dict[str, float]) -> None:
    assert 0.03 <= shares["test by picture"] <= 0.07
    assert shares["test by question"] > 0.08


@pytest.mark.parametrize(("function", "name"), [(cluster_bootstrap, "mean"), (paired_bootstrap, "difference")])
def test_docstrings_say_what_was_measured(function: Callable[..., Any], name: str) -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    said = [word.rstrip(".,;") for word in (function.__doc__ or "").split() if word.rstrip(".,;").endswith("%")]
    assert [f"{row[f'{name} by picture']:.1%}" for row in rows] == [word for word in said if word != "95%"]


def test_docstring_says_how_often_equal_models_were_told_apart() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    found = {
        accuracy: [row["test by picture"] for row in rows if row["accuracy"] == accuracy] for accuracy in (0.6, 0.95)
    }
    said = " ".join((paired_test.__doc__ or "").split())
    assert f"{min(found[0.6]):.1%} to {max(found[0.6]):.1%} of equal models" in said
    assert f"{min(found[0.95]):.1%} (20 pictures) to {max(found[0.95]):.1%}" in said
