"""A data set in numbers: how long, how large, how often, what was left out and what is there twice."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from eyespot.config import DataSettings
from eyespot.data.augmenter import Augmenter
from eyespot.data.collate import image_key
from eyespot.data.datamodule import Units
from eyespot.data.filters import Candidate, Dropped, DuplicateImages
from eyespot.data.looks import Look, Looks
from eyespot.data.mixture import Mixture, weights_of
from eyespot.data.sample import LoadReport, Sample
from eyespot.processing.images import ImageError
from eyespot.processing.processor import Processor
from eyespot.processing.prompt import PromptError

SHOWN = 20  # bars of a chart
NUM_PAIRS = 12
NUM_AUGMENTED, NUM_DRAWS = 4, 4
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


@dataclass
class DataReport:
    """What a data set is like.

    Attributes:
        facts: numbers, as they are written to report.json.
        lengths: name of a measure -> its value for every text, row or picture.
        sizes: width and height of every distinct picture, in pixels.
        pairs: (sample, its near-duplicate, how near), the first NUM_PAIRS that have pictures.
        visits: for a few samples, how they look and then how several draws of the augmentations make them look.
    """

    facts: dict[str, Any]
    lengths: dict[str, list[int]] = field(repr=False)
    sizes: list[tuple[int, int]] = field(repr=False)
    pairs: list[tuple[Sample, Sample, str]] = field(repr=False)
    visits: list[list[Sample]] = field(repr=False)


def describe(
    samples: Sequence[Sample],
    report: LoadReport,
    settings: DataSettings,
    processor: Processor,
    augmenter: Augmenter | None = None,
    seed: int = 0,
) -> DataReport:
    """Measure a data set.

    Args:
        samples: those that training reads, before the validation is split off.
        report: what became of the others.
        settings: of the data, for weights and lengths.
        processor: of the model, for lengths in tokens.
        augmenter: as training uses it.
        seed: of the run.
    """
    looks = Looks()
    pictures = _distinct(samples, looks)
    lengths = {
        "question, characters": [len(text) for sample in samples for text in _said(sample, "user")],
        "answer, characters": [len(text) for sample in samples for text in _said(sample, "assistant")],
        "row, tokens": list(_rows(samples, processor)),
    }
    aspects = [look.size[0] / look.size[1] for look in pictures]
    first_words = (" ".join(text.lower().split()[:2]) for sample in samples for text in _said(sample, "user"))
    near, pairs = _near_duplicates(samples, report, looks)
    units = Units(samples, settings.share if settings.packing else 1, seed, augmenter)
    facts = {
        "samples": len(samples),
        "pictures": len(pictures),
        "unreadable_pictures": looks.num_unreadable,
        "samples_without_picture": sum(not sample.images for sample in samples),
        "sources": _sources(samples, units, settings, seed),
        "left_out": _by_reason(report),
        "lengths": {name: _quantiles(values) for name, values in lengths.items()},
        "width": _quantiles([look.size[0] for look in pictures]),
        "height": _quantiles([look.size[1] for look in pictures]),
        "aspect": _quantiles([round(aspect, 3) for aspect in aspects]),
        "answers": _frequent(text.strip() for sample in samples for text in _said(sample, "assistant")),
        "first_words": _frequent(first_words),
        "near_duplicates": near,
        "augmentation": units.augmentation(),
    }
    return DataReport(facts, lengths, [look.size for look in pictures], pairs, _visits(units))


def _said(sample: Sample, role: str) -> list[str]:
    """What one side says, turn by turn; all captions in place of the one that is shown."""
    if sample.captions and role == "assistant":
        return list(sample.captions)
    turns = (message["content"] for message in sample.messages if message["role"] == role)
    said = ("\n".join(part["text"] for part in content if part["type"] == "text") for content in turns)
    return [text for text in said if text.strip()]


def _distinct(samples: Sequence[Sample], looks: Looks) -> list[Look]:
    """The looks of all pictures that can be opened, each once."""
    found: dict[str, Look] = {}
    for image in (image for sample in samples for image in sample.images):
        with contextlib.suppress(ImageError):  # counted by `looks`
            look = looks(image)
            found.setdefault(look.content, look)
    return list(found.values())


def _rows(samples: Sequence[Sample], processor: Processor) -> Iterator[int]:
    """Tokens of each sample as training reads it, uncut; a sample that cannot be written as a row has none."""
    for sample in samples:
        try:
            yield len(processor.encode_conversation(sample.messages).input_ids)
        except PromptError:
            continue


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    found = {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}
    return {"count": len(values), "mean": round(sum(values) / len(values), 2), **found}


def _frequent(texts: Iterable[str]) -> dict[str, Any]:
    counts = Counter(texts)
    return {"count": counts.total(), "distinct": len(counts), "most_frequent": counts.most_common(SHOWN)}


def _by_reason(report: LoadReport) -> dict[str, dict[str, Any]]:
    counts = Counter(rejected.reason for rejected in report.rejected)
    return {
        reason: {
            "count": count,
            "first": [str(rejected) for rejected in report.rejected if rejected.reason == reason][:3],
        }
        for reason, count in counts.most_common()
    }


def _sources(samples: Sequence[Sample], units: Units, settings: DataSettings, seed: int) -> dict[str, dict[str, Any]]:
    """Samples of every source, and how many of them an epoch visits."""
    counts = Counter(sample.source for sample in samples)
    weights = weights_of(settings.train)
    visits = Counter(counts)
    if weights:
        sources, sizes = units.sources(), units.sizes()
        visits = Counter()
        for _, unit in Mixture(sources, sizes, weights, seed).epoch(0):
            visits[sources[unit]] += sizes[unit]
    return {
        source or "all": {
            "samples": count,
            "weight": (weights or {}).get(source),
            "visits_of_an_epoch": visits[source],
            "share_of_visits": round(visits[source] / visits.total(), 4),
        }
        for source, count in counts.items()
    }


def _near_duplicates(
    samples: Sequence[Sample], report: LoadReport, looks: Looks
) -> tuple[dict[str, int], list[tuple[Sample, Sample, str]]]:
    """How many samples nearly repeat others, and pairs of them: first those left out, then those still there."""
    left_out = [record for record in report.rejected if isinstance(record, Dropped) and record.twin is not None]
    still_in = []
    search = DuplicateImages()
    for sample in samples:
        candidate = Candidate(sample, looks)
        try:
            found = search.judge(candidate)
        except ImageError:
            continue
        if found is None:
            search.keep(candidate)
        else:
            still_in.append(found)
    pairs: dict[Any, tuple[Sample, Sample, str]] = {}
    for state, records in (("left out", left_out), ("still there", still_in)):
        for record in records:
            if record.sample and record.twin and record.sample.images and record.twin.images:
                words = f"{state}: {record.reason}, {record.detail}"
                pairs.setdefault(image_key(record.sample), (record.twin, record.sample, words))
    return {"left_out": len(left_out), "still_there": len(still_in)}, list(pairs.values())[:NUM_PAIRS]


def _visits(units: Units) -> list[list[Sample]]:
    """For a few visits drawn by the seed, their first sample as it is, then in several draws of the augmentations."""
    if units.augmenter is None:
        return []
    order = random.Random(units.seed).sample(range(len(units)), len(units))
    with_pictures = (samples for i in order if (samples := units.plain(0, i))[0].images)
    shown = []
    for samples in itertools.islice(with_pictures, NUM_AUGMENTED):
        draws = [units.augmenter(samples, random.Random(f"{units.seed}-{draw}"))[0] for draw in range(NUM_DRAWS)]
        shown.append([samples[0], *draws])
    return shown
