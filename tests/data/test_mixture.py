"""Several sources: how they are read, and how often each is visited."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.config import ConfigError, DataSettings, check_mixture, sources_of
from eyespot.data import mixture, sources
from eyespot.data.collate import Collator
from eyespot.data.datamodule import Units, VLMDataModule, WindowSampler
from eyespot.data.mixture import Mixture
from eyespot.data.sample import Rejected, Sample
from eyespot.registry import Registry
from eyespot.training.run import load_data


def read_numbers(count: int, every: int = 10**9) -> Iterator[Sample | Rejected]:
    for number in range(count):
        if number % every == every - 1:
            yield Rejected(f"n{number}", "unlucky")
        else:
            yield Sample.question(f"n{number}", (), "what?", str(number))


@pytest.fixture
def _numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = Registry("data format", {"numbers": read_numbers})
    monkeypatch.setattr(sources, "FORMATS", formats)
    monkeypatch.setattr("eyespot.config.FORMATS", formats)


def numbers(count: int, **given: Any) -> dict[str, Any]:
    return {"format": "numbers", "count": count, **given}


def asked(source: str, pictures: int, each: int = 1) -> list[Sample]:
    return [
        Sample(f"{source}/{p}-{q}", (f"{p}.png",), Sample.question("x", "x", f"q{q}", "a").messages, source=source)
        for p in range(pictures)
        for q in range(each)
    ]


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_numbers")
class TestRead:
    def test_one_source_is_read_as_before(self) -> None:
        samples, report = mixture.read(numbers(4, every=3), None)
        assert [(sample.id, sample.source) for sample in samples] == [("n0", ""), ("n1", ""), ("n3", "")]
        assert (report.accepted, [record.id for record in report.rejected]) == (3, ["n2"])
        assert mixture.weights_of(numbers(4)) is None

    def test_sources_keep_their_ids_apart(self) -> None:
        train = {"a": numbers(3, every=3, weight=2), "b": numbers(2, weight=1)}
        samples, report = mixture.read(train, None)
        assert [sample.id for sample in samples] == ["a/n0", "a/n1", "b/n0", "b/n1"]
        assert [sample.source for sample in samples] == ["a", "a", "b", "b"]
        assert (report.accepted, [record.id for record in report.rejected]) == (4, ["a/n2"])
        assert mixture.weights_of(train) == {"a": 2, "b": 1}

    def test_groups_of_two_sources_have_nothing_in_common(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_groups() -> Iterator[Sample]:
            yield Sample.question("x", (), "q", "a", group="1.jpg")
            yield Sample.question("y", (), "q", "a")

        monkeypatch.setattr(sources, "FORMATS", Registry("data format", {"groups": read_groups}))
        samples, _ = mixture.read({"a": {"format": "groups"}, "b": {"format": "groups"}}, None)
        assert [sample.group for sample in samples] == ["a/1.jpg", "", "b/1.jpg", ""]

    @pytest.mark.parametrize(
        ("limit", "given", "wanted"),
        [
            (8, ({"weight": 3}, {"weight": 1}), {"a": 6, "b": 2}),
            (8, ({}, {}), {"a": 4, "b": 4}),
            (None, ({"limit": 5}, {}), {"a": 5, "b": 30}),
            (40, ({"limit": 5}, {}), {"a": 5, "b": 20}),
            (1, ({"weight": 99}, {"weight": 1}), {"a": 1, "b": 1}),
        ],
    )
    def test_limits(self, limit: int | None, given: Any, wanted: dict[str, int]) -> None:
        train = {"a": numbers(30, **given[0]), "b": numbers(30, **given[1])}
        samples, _ = mixture.read(train, limit)
        assert Counter(sample.source for sample in samples) == wanted

    def test_the_validation_is_of_all_sources_from_its_start(self) -> None:
        data = DataSettings({"a": numbers(100), "b": numbers(100)}, validation_share=0.4)
        train, validation, _ = load_data(data, seed=1)
        assert len(train) == 120 and len(validation) == 80
        assert {sample.source for sample in validation[:20]} == {"a", "b"}
        assert load_data(data, seed=1)[1] == validation != load_data(data, seed=2)[1]

    @pytest.mark.parametrize(
        ("train", "words"),
        [
            ({"a": {"count": 3}}, "data.train.a.format is missing; choices: numbers"),
            ({"a": numbers(3), "b": {"format": "nubmers"}}, "unknown data format 'nubmers'; did you mean 'numbers'?"),
            ({"a": numbers(3, wieght=1)}, "data format 'numbers' takes no argument 'wieght'"),
            ({"a": {"format": "numbers"}}, "data.train.a.count is missing"),
            ({"a": numbers(3, weight=1), "b": numbers(3)}, "data.train.b.weight is missing, others have one"),
            ({"a": numbers(3, weight=0)}, "data.train.a.weight is 0; it must be above 0"),
            ({"a": numbers(3, weight=True)}, "data.train.a.weight is True (bool); it needs float"),
            ({"a": numbers(3, limit=-1)}, "data.train.a.limit is -1; it must be above 0"),
            (numbers(3, weight=2), "data format 'numbers' takes no argument 'weight'"),
            ({**numbers(3), "b": numbers(3)}, "data format 'numbers' takes no argument 'b'"),
            ({}, "data.train.format is missing"),
        ],
    )
    def test_mixtures_that_cannot_be(self, train: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            check_mixture(train)
        assert words in str(caught.value)


def test_what_a_mixture_is() -> None:
    assert sources_of({"format": "x", "path": "y"}) == {"": {"format": "x", "path": "y"}}
    assert sources_of({"a": {"format": "x"}}) == {"a": {"format": "x"}}


# --- visiting -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_shares_are_kept_and_units_take_turns(parts: list[tuple[int, float]], epochs: int, seed: int) -> None:
    names = [f"s{i}" for i in range(len(parts))]
    units = [name for name, (count, _) in zip(names, parts, strict=True) for _ in range(count)]
    random.Random(0).shuffle(units)
    weights = {name: weight for name, (_, weight) in zip(names, parts, strict=True)}
    mixed = Mixture(units, [1] * len(units), weights, seed)
    visits: Counter[int] = Counter()
    for epoch in range(epochs):
        shown = [unit for _, unit in mixed.epoch(epoch)]
        assert len(shown) == len(mixed)
        of_source = Counter(units[unit] for unit in shown)
        for name, weight in weights.items():
            assert abs(of_source[name] - len(units) * weight / sum(weights.values())) <= 1
        visits.update(shown)
    for name in names:
        times = [visits[unit] for unit, source in enumerate(units) if source == name]
        assert max(times) - min(times) <= 1


def test_visits_of_a_unit_are_counted_from_zero() -> None:
    mixed = Mixture(["a"] * 3 + ["b"] * 30, [1] * 33, {"a": 1, "b": 1}, seed=5)
    rounds: dict[int, list[int]] = {}
    for epoch in range(4):
        for number, unit in mixed.epoch(epoch):
            rounds.setdefault(unit, []).append(number)
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in rounds.values())
    assert len(rounds[0]) > 20 and len(rounds[10]) in (2, 3)


def test_a_visit_of_many_samples_counts_as_many() -> None:
    """Weights are shares of samples, also where samples of one source stand together in large units."""
    samples = [*asked("big", 10, each=8), *asked("small", 80)]
    units = Units(samples, 8, seed=0)
    assert sorted(units.sizes()) == [1] * 80 + [8] * 10
    mixed = Mixture(units.sources(), units.sizes(), {"big": 1, "small": 3}, seed=0)
    shown = Counter[str]()
    for visit in mixed.epoch(0):
        shown.update(sample.source for sample in units[visit])
    assert shown == {"big": 40, "small": 120}
    assert mixed.mean_size == pytest.approx(160 / 125)


def test_sources_never_share_a_unit() -> None:
    """One picture in two sources is two units, or one of them could not be visited more often than the other."""
    units = Units([*asked("a", 3, each=2), *asked("b", 3, each=2)], 8, seed=0)
    assert sorted(units.sources()) == ["a"] * 3 + ["b"] * 3
    assert all(len({sample.source for sample in units[(0, i)]}) == 1 for i in range(len(units)))


def sampler(start: int = 0, rank: int = 0, world: int = 1, epochs: float = 3.0) -> WindowSampler:
    mixed = Mixture(["a"] * 7 + ["b"] * 30, [1] * 37, {"a": 2, "b": 1}, seed=3)
    windows = WindowSampler(37, epochs, 6, 3, rank, world, mixture=mixed)
    windows.start = start
    return windows


@pytest.mark.parametrize("start", [0, 1, 6, 17])
def test_a_later_start_goes_on_with_the_same_windows(start: int) -> None:
    assert list(sampler(start)) == list(sampler())[start:]
    assert len(list(sampler())) == sampler().num_steps == -(-37 * 3 // 6)


def test_devices_share_the_windows_out() -> None:
    whole = list(sampler())
    halves = zip(sampler(rank=0, world=2), sampler(rank=1, world=2), strict=True)
    for window, (first, second) in zip(whole, halves, strict=True):
        assert [*first, *second] == window


@pytest.mark.parametrize("num_steps", [1, 6, 7, 13, 99])
def test_visited_names_what_is_read(num_steps: int) -> None:
    read = [unit for window in list(sampler())[:num_steps] for _, unit in window]
    assert sampler().visited(num_steps) == list(dict.fromkeys(read))


def test_a_data_module_keeps_the_weights_and_resumes() -> None:
    samples = [*asked("a", 6, each=4), *asked("b", 48)]
    collator = Collator(None, 1)  # type: ignore[arg-type]

    def windows(start: int) -> list[Any]:
        module = VLMDataModule(samples, [], collator, batch_size=8, share=4, epochs=2, weights={"a": 2, "b": 1})
        module.sampler.start = start
        return [[module.train_units[visit] for visit in window] for window in module.sampler]

    whole = windows(0)
    shown = Counter(sample.source for window in whole for unit in window for sample in unit)
    assert shown == {"a": 96, "b": 48}
    assert windows(5) == whole[5:]


def test_without_weights_every_sample_comes_once_an_epoch() -> None:
    samples = [*asked("a", 5, each=2), *asked("b", 7)]
    collator = Collator(None, 1)  # type: ignore[arg-type]
    module = VLMDataModule(samples, [], collator, batch_size=4, share=2)
    shown = [s.id for window in module.sampler for visit in window for s in module.train_units[visit]]
    assert sorted(shown) == sorted(sample.id for sample in samples)


def test_a_source_without_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"source 'b' of data\.train has 0 training samples; drop it or loosen"):
        Mixture(["a", "a"], [1, 1], {"a": 1, "b": 1}, seed=0)
