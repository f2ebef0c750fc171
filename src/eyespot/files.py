"""Where things are kept, and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
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
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(partial)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
