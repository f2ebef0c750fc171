"""Several data sources in one run: reading them, and visiting them in given shares."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eyespot.config import sources_of
from eyespot.data import sources
from eyespot.data.sample import LoadReport, Rejected, Sample


def read(train: Mapping[str, Any], limit: int | None = None) -> tuple[list[Sample], LoadReport]:
    """The samples of ``data.train``, one source or a mixture, and what became of every record.

    In a mixture the name of the source stands before ids and groups, which are its own, and ``limit`` is divided in the
    shares of the weights (equally if there are none).
    """
    report = LoadReport()
    return list(itertools.chain.from_iterable(_streams(train, limit, report))), report


def interleaved(train: Mapping[str, Any], limit: int | None, report: LoadReport) -> Iterator[Sample]:
    """What ``read`` gives, but one by one, nothing kept, and one of each source in turn; the report is filled on the
    way."""
    waiting = collections.deque(_streams(train, limit, report))
    while waiting:
        stream = waiting.popleft()
        if (sample := next(stream, None)) is not None:
            yield sample
            waiting.append(stream)


def _streams(train: Mapping[str, Any], limit: int | None, report: LoadReport) -> list[Iterator[Sample]]:
    parts = sources_of(train)
    weights = weights_of(train) or dict.fromkeys(parts, 1.0)

    def share(name: str) -> int | None:
        return None if limit is None else max(1, round(limit * weights[name] / sum(weights.values())))

    return [_stream(name, source, share(name), report) for name, source in parts.items()]


def _stream(name: str, source: Mapping[str, Any], limit: int | None, report: LoadReport) -> Iterator[Sample]:
    of_eyespot = ("format", "weight", "limit") if name else ("format",)
    options = {key: value for key, value in source.items() if key not in of_eyespot}
    limits = [number for number in (limit, source.get("limit") if name else None) if number is not None]
    least = min(limits, default=None)
    of_source = LoadReport()
    samples = sources.stream(source["format"], of_source, **options)
    for sample in itertools.islice(sources.with_progress(samples, f"reading {source['format']}", least), least):
        yield _named(sample, name) if name else sample
    report.accepted += of_source.accepted
    report.rejected += [_renamed(record, name) for record in of_source.rejected]


def _renamed(record: Rejected, name: str) -> Rejected:
    return dataclasses.replace(record, id=f"{name}/{record.id}") if name else record


def _named(sample: Sample, name: str) -> Sample:
    group = f"{name}/{sample.group}" if sample.group else ""
    return dataclasses.replace(sample, id=f"{name}/{sample.id}", group=group, source=name)


def weights_of(train: Mapping[str, Any]) -> dict[str, float] | None:
    """The weights of a mixture; None if it has none."""
    weights = {name: source["weight"] for name, source in sources_of(train).items() if "weight" in source}
    return weights or None


class Mixture:
    """Which units each epoch visits when sources have weights.

    An epoch shows about as many samples as there are, and every source its weight's share of them. A source goes
    through its units in permutation after permutation, and the next epoch takes it up where the last one stopped. So
    how often a unit comes is no matter of chance: after any epoch those of one source differ by one visit at most. A
    small source of great weight comes around several times an epoch, a large one of small weight needs several.

    Args:
        sources: the source of each unit. sizes: its number of samples.
        weights: of the sources, above 0; only their ratios matter.
        seed: of the order.

    Raises:
        ValueError: a source has no unit.
    """

    def __init__(self, sources: Sequence[str], sizes: Sequence[int], weights: Mapping[str, float], seed: int) -> None:
        self.seed = seed
        self.units = {name: [i for i, source in enumerate(sources) if source == name] for name in weights}
        if empty := [name for name, units in self.units.items() if not units]:
            raise ValueError(f"source {empty[0]!r} of data.train has 0 training samples; drop it or loosen the filters")
        self.num_visits = {}
        for name, units in self.units.items():
            mean_size = sum(sizes[i] for i in units) / len(units)
            num_samples = sum(sizes) * weights[name] / sum(weights.values())
            self.num_visits[name] = max(1, round(num_samples / mean_size))
        self.mean_size = sum(sizes) / len(self)

    def __len__(self) -> int:
        """Visits in an epoch."""
        return sum(self.num_visits.values())

    def epoch(self, number: int) -> list[tuple[int, int]]:
        """(how often the unit came before, unit) of every visit, in order."""
        visits = [visit for name in self.units for visit in self._visits(name, number)]
        random.Random(f"{self.seed}-{number}").shuffle(visits)
        return visits

    def _visits(self, name: str, epoch: int) -> Iterator[tuple[int, int]]:
        units, count = self.units[name], self.num_visits[name]
        shown, order = -1, units
        for position in range(epoch * count, (epoch + 1) * count):
            if position // len(units) != shown:
                shown = position // len(units)
                order = random.Random(f"{self.seed}-{name}-{shown}").sample(units, len(units))
            yield shown, order[position % len(units)]
