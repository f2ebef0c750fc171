"""Where things are kept, and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def default_cache() -> Path:
    """EYESPOT_CACHE, or ~/.cache/eyespot."""
    return Path(os.environ.get("EYESPOT_CACHE", "~/.cache/eyespot")).expanduser()


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Only one process at a time, of all that see the folder's parent, is inside; the others wait. If it dies, the
    next one enters."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        yield


def make_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a new folder beside ``folder``, then rename it; of several processes the first one wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    partial.mkdir()  # and not mkdtemp, whose folders only their owner may read
    try:
        fill(partial)
        open_as_its_folder(partial)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_as_its_folder(folder: Path) -> None:
    """Let everybody read the tensors of a folder who may read the folder: safetensors keeps its files to their owner,
    and a container with another user could not serve them."""
    for file in folder.rglob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)
