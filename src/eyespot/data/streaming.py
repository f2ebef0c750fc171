"""Samples that stay on the disk: read from their sources once, in one pass, then one at a time from any place.

Training draws samples at random, and a resumed run must draw the same ones. A stream gives neither; a place in a file
gives both. So every stream becomes a folder of records whose places are known, and whatever order training wants, for
any number of processes and workers, it is the one of samples in memory.

``samples.jsonl`` holds one record a line, ``pictures.bin`` the pictures that are not files of their own, ``ends.bin``
int64 [n] where each line ends, ``keys.bin`` uint64 [n] a hash of source and pictures, equal for samples that may share
an image prefix.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from eyespot.config import ConfigError, DataSettings, build_parts, to_dict
from eyespot.data import mixture, sources
from eyespot.data.sample import ImageSource, LoadReport, Rejected, Sample
from eyespot.files import default_cache, make_folder, one_at_a_time
from eyespot.processing.images import ImageError, content_hash, open_image
from eyespot.registry import FILTERS

VERSION = 2  # of the files; another one is read anew
REPORT_FILE = "report.json"


class SampleStore(Sequence[Sample]):
    """The samples of a folder that ``write_stores`` made; in memory are only the numbers that say where they are.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ends, self._keys = (_numbers(folder / name, kind) for name, kind in (("ends", "<i8"), ("keys", "<u8")))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        record = json.loads(_piece(self.folder / "samples.jsonl", start, int(self._ends[index]) - start))
        images = tuple(self._image(image) for image in record.pop("images"))
        for key in ("messages", "answers", "captions", "options"):
            record[key] = tuple(record[key])
        return Sample(images=images, **record)

    def _image(self, image: str | list[int]) -> ImageSource:
        return image if isinstance(image, str) else _piece(self.folder / "pictures.bin", *image)

    def groups(self) -> npt.NDArray[np.int64]:
        """int64 [n], counted in order of appearance: equal for samples of one source about the same pictures."""
        _, first, group = np.unique(self._keys, return_index=True, return_inverse=True)
        number = np.empty(len(first), np.int64)
        number[np.argsort(first)] = np.arange(len(first))
        return number[group]

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleStore, (self.folder,)  # a worker process reads the files itself


def _numbers(file: Path, kind: str) -> npt.NDArray[Any]:
    path = file.with_suffix(".bin")
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


def _piece(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


class _Writer:
    """Appends samples, whose pictures are files or bytes, to the files of a store."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        folder.mkdir(parents=True)
        names = ("samples.jsonl", "pictures.bin", "ends.bin", "keys.bin")
        self.lines, self.pictures, self.ends, self.keys = (files.enter_context((folder / n).open("wb")) for n in names)
        self.count = 0

    def add(self, sample: Sample) -> None:
        key = hashlib.blake2b(sample.source.encode(), digest_size=8)
        for image in sample.images:
            assert isinstance(image, (str, bytes))
            key.update(b"\0" + (image.encode() if isinstance(image, str) else image))
        if not sample.images:
            key.update(struct.pack("<q", self.count))  # words share nothing
        record = {f.name: getattr(sample, f.name) for f in fields(sample)}
        record["images"] = [self._image(image) for image in sample.images]
        self.lines.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.ends.write(struct.pack("<q", self.lines.tell()))
        self.keys.write(key.digest())
        self.count += 1

    def _image(self, image: ImageSource) -> str | list[int]:
        if isinstance(image, str):
            return image
        assert isinstance(image, bytes)
        start = self.pictures.tell()
        self.pictures.write(image)
        return [start, len(image)]


def stored(settings: DataSettings, seed: int) -> tuple[SampleStore, SampleStore, LoadReport]:
    """Training and validation samples of ``data.streaming=true``, no picture in both, and what became of every record.

    They are read when nothing is kept for these settings, or when a file that they name has changed in size or time;
    of several processes that see the cache folder, one reads and the others wait.

    Raises:
        ConfigError: nothing usable was found.
    """
    folder = streams_root() / stream_key(settings, seed)
    with one_at_a_time(folder):
        if not folder.is_dir():
            make_folder(folder, functools.partial(write_stores, settings=settings, seed=seed))
    record = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    report = LoadReport(record["accepted"], [Rejected(*rejected) for rejected in record["rejected"]])
    train, validation = SampleStore(folder / "train"), SampleStore(folder / "validation")
    if not len(train):
        raise ConfigError(f"no usable training sample; {report.summary()}")
    return train, validation, report


def streams_root() -> Path:
    """The folder of everything that was streamed."""
    return default_cache() / "samples"


def clear() -> int:
    """Delete what was streamed; returns the bytes that were freed."""
    freed = sum(path.stat().st_size for path in streams_root().glob("*/**/*") if path.is_file())
    shutil.rmtree(streams_root(), ignore_errors=True)
    return freed


def stream_key(settings: DataSettings, seed: int) -> str:
    """16 hexadecimal digits that differ as soon as other samples could come, or on other sides."""
    read = {key: to_dict(settings)[key] for key in ("train", "validation", "filters", "limit", "validation_share")}
    stamps = [_stamp(value) for value in _leaves([settings.train, settings.validation])]
    words = json.dumps([VERSION, read, stamps, seed], sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _stamp(value: Any) -> list[int] | None:
    """Size and time of the file or folder that an option names; None if it names none."""
    try:
        status = os.stat(value) if isinstance(value, str) and value else None  # noqa: PTH116  any text may stand here
    except (OSError, ValueError):
        return None
    return status and [status.st_size, status.st_mtime_ns]


def write_stores(folder: Path, settings: DataSettings, seed: int) -> None:
    """Read the sources to their end; write the stores ``train`` and ``validation`` and the report into a folder."""
    report = LoadReport()
    split = Split(settings, seed)
    with ExitStack() as files:
        stores = {name: _Writer(folder / name, files) for name in ("train", "validation")}
        for sample in split.given():
            stores["validation"].add(sample)
        for sample in _read(settings, report):
            side = split.side(sample)
            if isinstance(side, Rejected):
                report.accepted -= 1
                report.rejected.append(side)
            else:
                stores[side].add(sample)
    record = {"accepted": report.accepted, "rejected": [[r.id, r.reason, r.detail] for r in report.rejected]}
    (folder / REPORT_FILE).write_text(json.dumps(record), encoding="utf-8")


def _read(settings: DataSettings, report: LoadReport) -> Iterator[Sample]:
    samples = map(_lasting, mixture.interleaved(settings.train, settings.limit, report))
    if not settings.filters:
        return samples
    from eyespot.data import filters

    return filters.passing(build_parts(FILTERS, settings.filters, "data.filters"), samples, report)


def _lasting(sample: Sample) -> Sample:
    """The sample with files or their bytes in place of opened pictures."""
    images = tuple(image if isinstance(image, (str, bytes)) else png(image) for image in sample.images)
    return sample if images == sample.images else replace(sample, images=images)


def png(image: ImageSource) -> bytes:
    """An opened picture as a file of the same pixels."""
    file = io.BytesIO()
    open_image(image).save(file, "PNG")
    return file.getvalue()


class Split:
    """Which side a sample stands on, decided sample by sample: every picture has a side that its content and the seed
    draw, so the share that is held out is only about ``validation_share``.

    Args:
        settings: with the share, or with validation data of their own.
        seed: another one gives another split.
    """

    def __init__(self, settings: DataSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self._given: set[str] = set()
        self._content = functools.lru_cache(maxsize=4096)(content_hash)  # questions about one picture stand together

    def given(self) -> Iterator[Sample]:
        """The samples of ``data.validation``; to be read before any side is asked for."""
        if self.settings.validation is not None:
            for sample in map(_lasting, mixture.interleaved(self.settings.validation, None, LoadReport())):
                self._given.update(map(self._content, sample.images))
                yield sample

    def side(self, sample: Sample) -> str | Rejected:
        """ "train" or "validation", or why neither.

        Raises:
            ConfigError: a training picture is also one of the given validation pictures.
        """
        if not self._given and self.settings.validation_share == 0:
            return "train"
        try:
            contents = [self._content(image) for image in sample.images]
        except ImageError as error:
            return Rejected(sample.id, sources.UNREADABLE, str(error))
        if self.settings.validation is not None:
            if not self._given.isdisjoint(contents):
                raise ConfigError(
                    f"a picture of training sample {sample.id!r} is also a validation picture; give another "
                    "data.validation, or leave it out and set validation_share"
                )
            return "train"
        sides = {self._is_held_out(name) for name in contents or [sample.group or sample.id]}
        if len(sides) == 2:
            return Rejected(sample.id, "its pictures are on both sides of the split")
        return "validation" if sides.pop() else "train"

    def _is_held_out(self, name: str) -> bool:
        drawn = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") < self.settings.validation_share * 2**64
