"""Data sets by the name of their format: load, stream, split by picture."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import PIL.Image

from eyespot.data.sample import ImageSource, LoadReport, Rejected, Sample
from eyespot.pictures import LazyPicture
from eyespot.registry import FORMATS, closest

logger = logging.getLogger(__name__)

UNREADABLE = "a picture cannot be opened"
_PROGRESS_AFTER_S = 2.0
_PROGRESS_EVERY = 256


def load(format: str, limit: int | None = None, **options: Any) -> tuple[list[Sample], LoadReport]:
    """Read a data set of a registered format to the end, or until `limit` samples are accepted.

    Args:
        format: name in `eyespot.registry.FORMATS`.
        limit: number of samples to stop after; rejected records do not count.
        options: the keywords of the format's reader.

    Returns:
        The samples, and what became of every record that was read.

    Raises:
        ValueError: unknown format or option, missing option, limit below 1, or what the reader finds wrong.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give 1 or more, or leave it out to read everything")
    return load_records(records(format, options), f"reading {format}", limit)


def load_records(
    records: Iterator[Sample | Rejected], title: str, limit: int | None = None
) -> tuple[list[Sample], LoadReport]:
    """The samples among records, at most so many, and what became of every record; a bar of this title on long work."""
    report = LoadReport()
    return list(itertools.islice(with_progress(_accepted(records, report), title, limit), limit)), report


def stream(format: str, report: LoadReport | None = None, **options: Any) -> Iterator[Sample]:
    """The samples one by one, nothing kept. An unknown or missing option is an error at once, not at the first sample.

    Args:
        report: filled on the way. Without one, rejected records are logged as a warning when the stream ends.

    Raises:
        ValueError: as `load`.
    """
    read = records(format, options)
    return _accepted(read, report) if report is not None else _logged(read)


def split_by_image(
    samples: Sequence[Sample], fraction: float, seed: int, report: LoadReport | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Split so that no picture is on both sides, whatever its file is called; order is kept.

    Samples are tied together if they share a picture (by content), or a group that is not empty; samples without
    pictures and group are tied by their id. Which ties are held out depends on the content of the pictures and the seed
    alone (without pictures: on groups or ids), not on file names, folders or the order of samples.

    Args:
        samples: at least two that are not tied together.
        fraction: share of the tied sets of samples that is held out, above 0 and below 1; each side gets at least one.
        seed: another seed gives another split.
        report: takes the samples whose pictures cannot be opened, which are then left out.

    Returns:
        The samples kept, and those held out.

    Raises:
        ImageError: a picture cannot be opened, and there is no report.
        ValueError: fraction out of its range, or too few pictures.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; give a number above 0 and below 1")
    samples, identities = _identified(samples, report)
    roots = _tie(identities)
    ties = sorted(set(roots.values()), key=lambda root: hashlib.sha256(f"{seed}:{root}".encode()).digest())
    if len(ties) < 2:
        raise ValueError(f"{len(ties)} picture cannot be split into two sides; give samples of 2 or more")
    held_out = set(ties[: min(max(round(fraction * len(ties)), 1), len(ties) - 1)])
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    seen: tuple[set[str], set[str]] = (set(), set())
    for sample, own in zip(samples, identities, strict=True):
        side = roots[own[0]] in held_out
        sides[side].append(sample)
        seen[side].update(own)
    if not seen[0].isdisjoint(seen[1]):
        raise AssertionError(f"{len(seen[0] & seen[1])} pictures are on both sides of the split; this is a bug")
    return sides


def check_disjoint(samples: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    """Raise ValueError if a picture stands on both sides, whatever its file is called."""
    sides = [
        {name for own in _identified(side, None)[1] for name in own if name.startswith("picture:")}
        for side in (samples, held_out)
    ]
    if both := sides[0] & sides[1]:
        raise ValueError(
            f"{len(both)} of {len(sides[1])} validation pictures are also training pictures; give another set, or "
            "validation_share alone"
        )


def records(format: str, options: dict[str, Any]) -> Iterator[Sample | Rejected]:
    """What the reader of a format finds. An unknown or missing option is an error at once.

    Raises:
        ValueError: as `load`.
    """
    reader: Callable[..., Iterator[Sample | Rejected]] = FORMATS[format]
    parameters = inspect.signature(reader).parameters
    names = list(parameters)
    for name in options:
        if name not in parameters:
            raise ValueError(
                f"data format {format!r} has no option {name!r}{closest(name, names)} (options: {', '.join(names)})"
            )
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ValueError(f"data format {format!r} needs the option {name!r}; give {name}=...")
    return reader(**options)


def _accepted(records: Iterator[Sample | Rejected], report: LoadReport) -> Iterator[Sample]:
    for record in records:
        if isinstance(record, Rejected):
            report.rejected.append(record)
        else:
            report.accepted += 1
            yield record


def _logged(records: Iterator[Sample | Rejected]) -> Iterator[Sample]:
    report = LoadReport()
    try:
        yield from _accepted(records, report)
    finally:
        if report.rejected:
            logger.warning("%s", report.summary())


def with_progress(samples: Iterator[Sample], description: str, total: int | None) -> Iterator[Sample]:
    """The same samples; with a bar, if a person is watching and the work takes longer than a moment."""
    if not sys.stderr.isatty():
        yield from samples
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(description, total=total)
    show_at = time.monotonic() + _PROGRESS_AFTER_S
    try:
        for number, sample in enumerate(samples, 1):
            if not progress.live.is_started and time.monotonic() > show_at:
                progress.start()
            if number % _PROGRESS_EVERY == 0:
                progress.update(task, completed=number)
            yield sample
    finally:
        progress.stop()


def _identified(samples: Sequence[Sample], report: LoadReport | None) -> tuple[list[Sample], list[list[str]]]:
    """Samples whose pictures open, and for each what it shares with others of its side; never empty."""
    # Late, because it brings transformers and torch, which reading text and names does not need.
    from eyespot.processing.images import ImageError, content_hash

    hashes: dict[str | bytes | int | LazyPicture, str | ImageError] = {}

    def picture(image: ImageSource) -> str:
        # Many questions share a picture; the samples keep Pillow images alive, so their addresses are unique.
        key = id(image) if isinstance(image, PIL.Image.Image) else image
        if key not in hashes:
            try:
                hashes[key] = f"picture:{content_hash(image)}"
            except ImageError as error:
                hashes[key] = error
        if isinstance(found := hashes[key], ImageError):
            raise found
        return found

    usable, identities = [], []
    for sample in samples:
        try:
            own = [picture(image) for image in sample.images]
        except ImageError as error:
            if report is None:
                raise
            report.accepted -= 1
            report.rejected.append(Rejected(sample.id, UNREADABLE, str(error)))
            continue
        if sample.group:
            own.append(f"group:{sample.group}")
        usable.append(sample)
        identities.append(own or [f"id:{sample.id}"])
    return usable, identities


def _tie(identities: list[list[str]]) -> dict[str, str]:
    """Union-find: each identity to the smallest of the pictures it is tied to, or of all if there is no picture."""
    parents = {identity: identity for own in identities for identity in own}

    def root(identity: str) -> str:
        while parents[identity] != identity:
            parents[identity] = parents[parents[identity]]
            identity = parents[identity]
        return identity

    for own in identities:
        for other in own[1:]:
            # A picture is named by its content, so it represents the set before any group does, whose name may change.
            first, second = sorted((root(own[0]), root(other)), key=lambda name: (name.startswith("group:"), name))
            parents[second] = first
    return {identity: root(identity) for identity in parents}
