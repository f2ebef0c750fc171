"""Data sets that are one JSON document, as COCO and VQA are published: lists of records that name each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eyespot.data.formats.records import BadRecord, existing_file, image_file
from eyespot.data.sample import Rejected


class AnnotatedPicture(NamedTuple):
    """Id and path of a picture, and what is annotated in it."""

    id: str
    path: str
    annotations: list[dict[str, Any]]


def find_document(path: str, lists: Sequence[str]) -> dict[str, Any] | None:
    """The JSON object in a file .json that has these lists; None for every other file or name, such as JSON lines.

    Raises:
        ValueError: the file is neither JSON nor JSON lines, or has some of the lists only.
    """
    file = Path(path)
    if file.suffix != ".json" or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # an object and more behind it: JSON lines
            return None
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path!r} is not JSON: {error.msg} at {where}; correct it there") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    there = [name for name in lists if isinstance(content, dict) and isinstance(content.get(name), list)]
    if not there:
        return None
    if there != list(lists):
        raise ValueError(f"{path!r} has {', '.join(there)} only; give the file that has {', '.join(lists)}")
    document: dict[str, Any] = content
    return document


def load_document(path: str, lists: Sequence[str]) -> dict[str, Any]:
    """``find_document`` where nothing else will do.

    Raises:
        ValueError: no such file, or not of this form.
    """
    document = find_document(str(existing_file(path)), lists)
    if document is None:
        raise ValueError(f"{path!r} is no JSON document with {', '.join(lists)}; give the file as it was published")
    return document


def without_effect(path: str, **options: object) -> None:
    """Raise ValueError if one of these options, which mean nothing for this file, was given."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} has no effect on {path!r}; drop it")


def id_in(record: Any, key: str) -> int | str:
    """The number or name under a key. Raises BadRecord."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, (int, str)):
        raise BadRecord(f"{key} is missing", repr(record)[:80])
    return value


def annotated_pictures(
    document: dict[str, Any], path: str, image_folder: str | None
) -> Iterator[AnnotatedPicture | Rejected]:
    """The pictures of a document in COCO's form, and what is wrong with other records.

    Annotations of a picture that is rejected are passed over, so that a part of the pictures is enough.
    Source: https://cocodataset.org/#format-data.

    Args:
        path: of the document. image_folder: of the pictures; the folder of the document unless given.
    """
    stem, folder = Path(path).stem, Path(path).parent if image_folder is None else image_folder
    pictures: dict[int | str, AnnotatedPicture | None] = {}  # None: rejected
    for number, record in enumerate(document["images"], 1):
        try:
            id = id_in(record, "id")
            if id in pictures:
                raise BadRecord("image id repeats", repr(id))
            pictures[id] = None
            pictures[id] = AnnotatedPicture(str(id), image_file(record.get("file_name"), folder), [])
        except BadRecord as bad:
            yield bad.rejected(f"{stem}:image {number}")
    for number, record in enumerate(document["annotations"], 1):
        try:
            id = id_in(record, "image_id")
            if id not in pictures:
                raise BadRecord("annotation of an unknown image", repr(id))
            if (picture := pictures[id]) is not None:
                picture.annotations.append(record)
        except BadRecord as bad:
            yield bad.rejected(f"{stem}:annotation {number}")
    yield from filter(None, pictures.values())
