"""Records of data files, before they are samples: lines of JSON, pictures on disk, and what is wrong with a record."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eyespot.data.sample import Rejected


class BadRecord(ValueError):
    """A record that cannot become a sample; the reader turns it into a counted `Rejected`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def rejected(self, id: str) -> Rejected:
        return Rejected(id, self.reason, self.detail)


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path of a data file. Raises ValueError if there is no such file."""
    file = Path(path)
    if not file.is_file():
        state = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"data file {str(file)!r} {state}; check the path")
    return file


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """Number (from 1) and content of every line that is not blank; a line that is no JSON object is a `BadRecord`.

    Raises:
        ValueError: the file is not UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_object(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def json_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """As `json_lines`, also of a file that holds one JSON list of objects.

    Raises:
        ValueError: the file is not UTF-8 text, or begins like a list and is none.
    """
    with path.open("rb") as file:
        is_list = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if not is_list:
        yield from json_lines(path)
        return
    for number, record in enumerate(_json_list(path), 1):
        is_object = isinstance(record, dict)
        yield number, record if is_object else BadRecord("record is not a JSON object", type(record).__name__)


def _json_list(path: Path) -> list[Any]:
    try:
        records: list[Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; correct it there"
        ) from None
    return records


def _json_object(line: str) -> dict[str, Any] | BadRecord:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRecord("line is not JSON", str(error))
    return record if isinstance(record, dict) else BadRecord("line is not a JSON object", type(record).__name__)


def record_id(record: dict[str, Any], default: str) -> str:
    """The record's own id as text; 0 is an id, nothing and the empty text are not."""
    own = record.get("id")
    return default if own is None or own == "" else str(own)


def image_file(name: object, folder: str | os.PathLike[str]) -> str:
    """The path of a picture named by a record; relative names start at `folder`. The file is not decoded.

    Raises:
        BadRecord: no name, or no such file.
    """
    if not isinstance(name, str) or not name:
        raise BadRecord("image is not a file name", repr(name)[:80])
    path = os.path.join(folder, name)  # noqa: PTH118  Path would spell the name anew
    # A name with a NUL character is a name of no file, and older Pythons raise for it.
    if "\0" in path or not os.path.isfile(path):  # noqa: PTH113  Path.is_file raises for a long name
        raise BadRecord("image file is missing", repr(path))
    return path
