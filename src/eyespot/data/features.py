"""Features of pictures kept on disk, so that a frozen encoder sees every picture once.

One folder for each encoder (weights, layer, preprocessing, precision), in it segments that are written once, whole or
not at all, and never changed: ``keys`` uint8 [N, 32], the SHA-256 of each picture, and ``features`` [N, P, E], which
are mapped into memory rather than read. Any number of processes may read and write; a picture that two of them add is
kept twice and read once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from eyespot.compose import tensors_hash
from eyespot.data.sample import ImageSource
from eyespot.files import default_cache
from eyespot.models.vlm import VLM
from eyespot.processing.images import ImageError, content_hash, open_image
from eyespot.processing.processor import Processor

SEGMENT_BYTES = 64_000_000  # at most so much is computed again after a kill -9
ABOUT_FILE = "encoder.json"
# settings of transformers that say where a model came from, not what it computes
_ORIGIN = {"_name_or_path", "transformers_version", "dtype", "architectures", "processor_class"}


class CacheFull(ValueError):
    """The features do not fit into the limit, or onto the disk."""


def features_root() -> Path:
    """The folder of all encoders' features."""
    return default_cache() / "features"


def picture_digest(picture: ImageSource | os.PathLike[str]) -> bytes:
    """SHA-256 of a picture's file (or of its upright RGB pixels, when it is opened already): 32 bytes.

    The same picture in two encodings has two digests, which costs a second encoding and spares decoding.

    Raises:
        ImageError: a file cannot be read, an opened picture cannot be decoded.
    """
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).digest()
    if not isinstance(picture, (str, os.PathLike)):
        return bytes.fromhex(content_hash(picture))
    try:
        status = os.stat(picture)  # noqa: PTH116  Path would read "" as the current folder
        if stat.S_ISREG(status.st_mode):
            return _file_digest(os.fspath(picture), status.st_size, status.st_mtime_ns)
    except OSError:
        pass
    open_image(picture)  # says what is wrong
    raise ImageError(f"{str(picture)!r} cannot be read now, but could be a moment later; try again")


@functools.lru_cache(maxsize=1_000_000)
def _file_digest(path: str, size: int, mtime_ns: int) -> bytes:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def encoder_key(model: VLM, processor: Processor, precision: str) -> str:
    """16 hexadecimal digits that differ as soon as the same picture could get other features."""
    config = model.config

    def what_it_computes(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in _ORIGIN}

    settings = {
        "vision": what_it_computes(config.vision_config.to_dict()),
        "layer": [config.vision_layer, config.keep_cls, config.num_prefix_tokens],
        "preprocessing": what_it_computes(processor.image_processor.to_dict()),
        "weights": tensors_hash(model.vision.state_dict()),
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


class FeatureStore:
    """The features of one encoder: ``picture in store``, ``store[picture]`` -> float [P, E].

    Args:
        folder: of this encoder; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._segments: dict[str, Tensor] = {}
        self._places: dict[bytes, tuple[str, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take notice of what other processes wrote."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._segments:
                continue
            try:
                tensors = load_file(path)
                os.utime(path)  # the least recently used are the first to go
            except FileNotFoundError:
                continue  # another process has made room
            self._segments[path.name] = tensors["features"]
            for row, key in enumerate(tensors["keys"].numpy()):
                self._places[key.tobytes()] = (path.name, row)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, picture: ImageSource) -> bool:
        return picture_digest(picture) in self._places

    def __getitem__(self, picture: ImageSource) -> Tensor:
        """float [P, E]. Raises KeyError."""
        segment, row = self._places[picture_digest(picture)]
        return self._segments[segment][row]

    def add(self, digests: Sequence[bytes], features: Tensor) -> None:
        """Write a segment: N digests and features float [N, P, E]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self.folder, prefix=".part-")
        os.close(handle)
        try:
            keys = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)
            save_file({"keys": keys, "features": features.cpu().contiguous()}, partial)
            os.replace(partial, self.folder / f"{time.time_ns():020d}-{Path(partial).name[6:]}.safetensors")
        finally:
            Path(partial).unlink(missing_ok=True)
        self.refresh()

    # a worker process maps the files itself
    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]


@dataclass
class _Pixels:
    """A data set of (digest, pixel values [3, H, W] or None), for workers to decode and resize."""

    pictures: list[tuple[bytes, Any]]
    processor: Processor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[bytes, Tensor | None]:
        digest, picture = self.pictures[index]
        try:
            return digest, self.processor.pixel_values([picture])[0]
        except ImageError:
            return digest, None


@dataclass
class _Segment:
    """Features on the way to the disk."""

    store: FeatureStore
    digests: list[bytes] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)

    def add(self, digests: Sequence[bytes], features: Tensor) -> None:
        self.digests += digests
        self.features.append(features)
        if sum(part.nbytes for part in self.features) >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.digests:
            digests, features = self.digests, torch.cat(self.features)
            self.digests, self.features = [], []
            self.store.add(digests, features)


def fill(
    store: FeatureStore,
    pictures: Iterable[ImageSource],
    processor: Processor,
    encode: Callable[[Tensor], Tensor],
    *,
    limit_bytes: float,
    batch_size: int = 32,
    num_workers: int = 0,
    console: Console | None = None,
) -> int:
    """Encode every picture that the store does not hold yet; unreadable ones are left out.

    What was encoded stays when this is interrupted, and the next call goes on there.

    Args:
        encode: pixel values float [N, 3, H, W] -> features float [N, P, E].
        limit_bytes: of all encoders' features together; those that were used longest ago make room.

    Returns:
        How many pictures were encoded.

    Raises:
        CacheFull: the features need more than the limit or the disk has; nothing was written.
    """
    missing = missing_from(store, pictures)
    if not missing:
        return 0
    loader: DataLoader[Any] = DataLoader(
        _Pixels(missing, processor),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_readable,
    )
    segment = _Segment(store)
    done = 0
    batches = track(
        loader,
        description=f"encoding {len(missing):,} pictures",
        console=console,
        transient=True,
        disable=console is None or not console.is_terminal,
    )
    try:
        for digests, pixels in batches:
            if not digests:
                continue
            features = encode(pixels).cpu()
            if done == 0:
                make_room(store.folder, len(missing) * features[0].nbytes, limit_bytes)
            segment.add(digests, features)
            done += len(digests)
    finally:
        segment.flush()
    return done


def missing_from(store: FeatureStore, pictures: Iterable[ImageSource]) -> list[tuple[bytes, ImageSource]]:
    """Digests and pictures that the store does not hold, each once, in order."""
    return [(digest, picture) for digest, picture in _distinct(pictures) if digest not in store._places]


def _distinct(pictures: Iterable[ImageSource]) -> Iterable[tuple[bytes, ImageSource]]:
    seen: set[bytes] = set()
    for picture in pictures:
        try:
            digest = picture_digest(picture)
        except ImageError:
            continue  # the loader of samples will meet it again and say so
        if digest not in seen:
            seen.add(digest)
            yield digest, picture


def _readable(items: Sequence[tuple[bytes, Tensor | None]]) -> tuple[list[bytes], Tensor | None]:
    found = [(digest, pixels) for digest, pixels in items if pixels is not None]
    return [digest for digest, _ in found], torch.stack([pixels for _, pixels in found]) if found else None


def make_room(folder: Path, needed_bytes: int, limit_bytes: float) -> None:
    """Delete features of other encoders, those used longest ago first, until ``needed_bytes`` fit into the limit.

    Raises:
        CacheFull: they cannot.
    """
    kept = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    others = [path for path in folder.parent.glob("*/*.safetensors") if path.parent != folder]
    others.sort(key=lambda path: path.stat().st_mtime)
    sizes = [path.stat().st_size for path in others]
    if kept + needed_bytes > limit_bytes or needed_bytes > free + sum(sizes):
        raise CacheFull(
            f"features of the pictures need {(kept + needed_bytes) / 1e9:.1f} GB; the limit is {limit_bytes / 1e9:.1f} "
            f"GB (data.cache_gb) and the disk of {str(folder)!r} has {free / 1e9:.1f} GB left"
        )
    total = kept + sum(sizes)
    for path, size in zip(others, sizes, strict=True):
        if total + needed_bytes <= limit_bytes and needed_bytes <= free:
            return
        path.unlink(missing_ok=True)
        total, free = total - size, free + size


@dataclass(frozen=True)
class StoredEncoder:
    """One row of ``eyespot cache show``; shape: [P, E] of a picture's features."""

    key: str
    name: str
    num_pictures: int
    shape: tuple[int, ...]
    num_bytes: int
    used: float


def describe(folder: Path, model: VLM) -> None:
    """Say in words whose features the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.vision_config
    about = {"name": f"{config.model_type} {getattr(config, '_name_or_path', '')}".strip()}
    (folder / ABOUT_FILE).write_text(json.dumps(about), encoding="utf-8")


def stored(root: Path) -> list[StoredEncoder]:
    """What is kept, the latest used first."""
    rows = []
    for folder in root.glob("*/"):
        num_pictures, num_bytes, used, shape = 0, 0, 0.0, tuple[int, ...]()
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                length, *shape_of = file.get_slice("features").get_shape()
            status = path.stat()
            num_pictures, shape = num_pictures + length, tuple(shape_of)
            num_bytes, used = num_bytes + status.st_size, max(used, status.st_mtime)
        about = folder / ABOUT_FILE
        name = json.loads(about.read_text(encoding="utf-8"))["name"] if about.is_file() else "?"
        rows.append(StoredEncoder(folder.name, name, num_pictures, shape, num_bytes, used))
    return sorted(rows, key=lambda row: -row.used)


def clear(root: Path, key: str | None = None) -> int:
    """Delete the features of one encoder, or all; returns the bytes that were freed.

    Raises:
        ValueError: no encoder of that key.
    """
    rows = [row for row in stored(root) if key in (None, row.key)]
    if key is not None and not rows:
        known = ", ".join(row.key for row in stored(root)) or "none"
        raise ValueError(f"no features of an encoder {key!r} are kept; there are: {known}")
    for row in rows:
        shutil.rmtree(root / row.key)
    return sum(row.num_bytes for row in rows)
