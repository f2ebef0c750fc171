"""Questions from the rows of a table, in the forms in which benchmarks are published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from eyespot.data.formats.records import BadRecord, record_id
from eyespot.data.formats.rows import group_of, open_table, picture_of
from eyespot.data.sample import ImageSource, Rejected, Sample

MakeSample = Callable[[str, dict[str, Any], ImageSource, str], Sample | Iterable[Sample]]
"""Id, row, picture and group of the picture to a sample, or to several of one row; raises BadRecord."""


def questions_of(
    path: str, image_folder: str | None, split: str | None, make: MakeSample, id_column: str = "question_id"
) -> Iterator[Sample | Rejected]:
    """The sample or samples of each row of a file, or of a data set on the Hub (see ``open_table``), with a picture.

    Raises:
        ValueError: as ``open_table``.
        ImportError: as ``open_table``.
    """
    table = open_table(path, ["image"], split)
    folder = table.folder if image_folder is None else image_folder
    for number, row in table.rows:
        id = f"{table.stem}:{number}"
        try:
            if isinstance(row, BadRecord):
                raise row
            id = record_id({"id": row.get(id_column, row.get("id"))}, id)
            image = picture_of(row, "image", folder)
            made = make(id, row, image, group_of(id, image))
            yield from (made,) if isinstance(made, Sample) else made
        except BadRecord as bad:
            yield bad.rejected(id)


def text_of(row: dict[str, Any], *columns: str) -> str:
    """The text in the first of these columns that the row has, without outer space.

    Raises:
        BadRecord: there is none, or it is empty.
    """
    value = next((row[column] for column in columns if row.get(column) is not None), None)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"{columns[-1]} is not a text", repr(value)[:80])
    return value.strip()
