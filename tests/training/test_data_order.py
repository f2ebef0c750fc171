"""The order of data is a pure function of seed and position."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.data.datamodule import Units, WindowSampler
from eyespot.data.sample import Sample


def questions(pictures: int, each: int) -> list[Sample]:
    return [Sample.question(f"{p}-{q}", f"{p}.png", f"q{q}", "a") for p in range(pictures) for q in range(each)]


@given(st.integers(1, 50), st.floats(0.1, 3), st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_every_unit_comes_once_in_an_epoch_and_ranks_share_nothing(
    n: int, epochs: float, window: int, world: int
) -> None:
    window *= world
    ranks = [list(WindowSampler(n, epochs, window, 7, rank, world)) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {WindowSampler(n, epochs, window, 7, 0, world).num_steps}
    seen = Counter(visit for steps in ranks for step in steps for visit in step)
    assert all(count == 1 for count in seen.values())
    total = WindowSampler(n, epochs, window, 7).total
    assert total - len(seen) < world  # at most what does not divide evenly in the last window


@pytest.mark.parametrize("start", [0, 1, 5, 11])
def test_a_sampler_started_later_goes_on_with_the_same_windows(start: int) -> None:
    whole = WindowSampler(37, 2.5, 8, seed=3)
    later = WindowSampler(37, 2.5, 8, seed=3)
    later.start = start
    assert list(later) == list(whole)[start:]


def test_the_last_partial_window_is_kept() -> None:
    steps = list(WindowSampler(10, 1, 4, seed=0))
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(index for step in steps for _, index in step) == list(range(10))


def test_epochs_differ_and_seeds_differ() -> None:
    sampler = WindowSampler(100, 2, 100, seed=0)
    first, second = list(sampler)
    assert [i for _, i in first] != [i for _, i in second]
    assert next(iter(WindowSampler(100, 1, 100, seed=1))) != first


def test_units_hold_every_sample_once_and_one_picture_each() -> None:
    units = Units(questions(5, 7), size=3, seed=0)
    for epoch in (0, 1):
        drawn = [units[(epoch, i)] for i in range(len(units))]
        assert sorted(s.id for unit in drawn for s in unit) == sorted(s.id for s in questions(5, 7))
        assert all(len({s.images for s in unit}) == 1 and len(unit) <= 3 for unit in drawn)
    assert max(len(u) for u in drawn) - min(len(u) for u in drawn) <= 1
    assert units.mean_size == pytest.approx(35 / len(units))


def test_units_mix_anew_in_each_epoch_and_repeat_exactly() -> None:
    units = Units(questions(1, 12), size=4, seed=0)
    assert [s.id for s in units[(0, 0)]] == [s.id for s in units[(0, 0)]]
    assert {s.id for s in units[(0, 0)]} != {s.id for s in units[(1, 0)]}


def test_text_only_samples_stand_alone() -> None:
    text = [Sample(str(i), (), ({"role": "user", "content": [{"type": "text", "text": "hi"}]},)) for i in range(3)]
    assert len(Units(text, size=8, seed=0)) == 3


def test_a_caption_sample_shows_another_caption_in_another_epoch() -> None:
    units = Units([Sample.caption("c", "x.png", [f"caption {i}" for i in range(9)])], size=1, seed=0)
    shown = {units[(epoch, 0)][0].messages[-1]["content"][0]["text"] for epoch in range(12)}
    assert len(shown) > 3
    assert units[(4, 0)] == units[(4, 0)]
