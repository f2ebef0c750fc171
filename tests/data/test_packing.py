"""Rows waste little; what packed rows compute is tested in invariances/test_i01_packing.py."""

from __future__ import annotations

import random

import pytest

from eyespot.data.packing import Document, best_fit, fill_rows
from eyespot.processing.processor import Encoded


def documents(count: int, seed: int, mean: float, spread: float, longest: int) -> list[Document]:
    """Lengths as texts have them: log-normal."""
    rng = random.Random(seed)
    lengths = [min(longest, max(4, round(rng.lognormvariate(mean, spread)))) for _ in range(count)]
    return [Document(Encoded([1] * n, [1] * n, 0)) for n in lengths]


@pytest.mark.parametrize(("count", "mean", "spread", "row_length"), [
    (64, 5.5, 0.6, 2048),  # conversations of a few hundred tokens
    (32, 3.2, 0.4, 256),  # short questions behind a picture
    (256, 4.0, 1.0, 1024),  # a few long ones among many short ones
])  # fmt: skip
@pytest.mark.parametrize("seed", range(5))
def test_less_than_five_percent_is_padding(count: int, mean: float, spread: float, row_length: int, seed: int) -> None:
    given = documents(count, seed, mean, spread, row_length)
    rows = fill_rows(given, row_length)
    width = max(sum(map(len, row)) for row in rows)
    tokens = sum(map(len, given))
    assert sorted(map(id, given)) == sorted(id(document) for row in rows for document in row), "all, each once"
    assert width <= row_length
    assert 1 - tokens / (len(rows) * width) < 0.05
    padded = 1 - tokens / (count * max(map(len, given)))
    assert padded > 0.3, "padding each sample to the longest one would have wasted far more"


def test_evening_out_needs_no_further_row() -> None:
    given = documents(40, 3, 4.0, 0.8, 300)
    assert len(fill_rows(given, 300)) == len(best_fit(given, 300))
