"""Pictures with captions: CSV, JSON lines, parquet, a folder of `datasets`, or a name on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from eyespot.data.formats.records import BadRecord, record_id
from eyespot.data.formats.rows import group_of, open_table, picture_of
from eyespot.data.sample import Rejected, Sample

_NUMBERED = re.compile(r"caption_(\d+)")


def read_captions(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    image_column: str = "image",
    caption_columns: Sequence[str] | None = None,
    prompt: str = "",
    split: str | None = None,
    streaming: bool = False,
) -> Iterator[Sample | Rejected]:
    """Rows with a picture (a file name, or the picture itself) and one or more captions; a sample keeps them all.

    Args:
        path: a file .csv, .tsv, .jsonl (one object a line), .json (the same, or a list of objects) or .parquet; a
            folder written by `save_to_disk` of `datasets`; or, where nothing of that name is on the disk, a data set
            on the Hub.
        image_folder: where relative names start; unless given, the folder of the file (or `path`, if it is one).
        image_column: column of the picture.
        caption_columns: columns of captions, texts or lists of texts; unless given "captions", or "caption", or
            "caption_0", "caption_1" and so on.
        prompt: what the user says beside the picture.
        split: which part of a folder or of a Hub data set.
        streaming: read a Hub data set while it is downloaded.

    Raises:
        ValueError: nothing to read there, a column or split is missing, or an option that has no effect here.
        ImportError: parquet without pyarrow, folder or Hub without datasets.
    """
    if isinstance(caption_columns, str):
        raise ValueError(  # noqa: TRY004  a wrong option is always a ValueError
            f"caption_columns is the text {caption_columns!r}; give a list, [{caption_columns!r}]"
        )
    table = open_table(path, [image_column, *(caption_columns or ())], split, streaming)
    folder = table.folder if image_folder is None else image_folder
    for number, row in table.rows:
        id = f"{table.stem}:{number}"
        try:
            if isinstance(row, BadRecord):
                raise row
            id = record_id(row, id)
            image = picture_of(row, image_column, folder)
            captions = _captions(row, caption_columns)
            yield Sample.caption(id, image, captions, prompt, group=group_of(id, image))
        except BadRecord as bad:
            yield bad.rejected(id)


def _captions(row: dict[str, Any], columns: Sequence[str] | None) -> list[str]:
    captions: list[str] = []
    for column in _default_columns(row) if columns is None else columns:
        value = row.get(column)
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise BadRecord("caption is not a text", repr(text)[:80])
            if text and text.strip():
                captions.append(text)
    if not captions:
        raise BadRecord("no caption")
    return captions


def _default_columns(row: dict[str, Any]) -> list[str]:
    for column in ("captions", "caption"):
        if column in row:
            return [column]
    numbered = ((match, column) for column in row if (match := _NUMBERED.fullmatch(column)))
    return [column for match, column in sorted(numbered, key=lambda item: int(item[0][1]))]
