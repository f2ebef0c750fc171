"""Rows of tables, whatever holds them: CSV, JSON lines, parquet, a folder of `datasets`, or a name on the Hub."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

from eyespot.data.formats.records import BadRecord, existing_file, image_file, json_lines, json_records
from eyespot.data.sample import ImageSource
from eyespot.registry import closest

# A row with its number (from 1), or what is wrong with it.
Rows = Iterator[tuple[int, dict[str, Any] | BadRecord]]

_FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# Source: https://huggingface.co/docs/huggingface_hub/package_reference/utilities#huggingface_hub.utils.validate_repo_id
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Table(NamedTuple):
    """Rows, the name for samples without id, and the folder where relative names of pictures start."""

    rows: Rows
    stem: str
    folder: Path


def open_table(
    path: str | os.PathLike[str], needed: list[str], split: str | None = None, streaming: bool = False
) -> Table:
    """Rows of a file .csv, .tsv, .jsonl (one object a line), .json (the same, or a list of objects) or .parquet; of a
    folder written by `save_to_disk` of `datasets`; or, where nothing of that name is on the disk, of a data set on the
    Hub.

    Args:
        needed: columns that must be there, that of the picture first.
        split: which part of a folder or of a Hub data set. streaming: read a Hub data set while it is downloaded.

    Raises:
        ValueError: nothing to read there, a column or split is missing, or an option that has no effect here.
        ImportError: parquet without pyarrow, folder or Hub without datasets.
    """
    path, name = Path(path), str(path)
    is_hub = not path.exists() and path.suffix not in _FILE_SUFFIXES and _HUB_NAME.fullmatch(name) is not None
    if streaming and not is_hub:
        raise ValueError(f"streaming has no effect on {name!r}, which is read row by row from the disk; drop it")
    if is_hub or path.is_dir():
        rows = _dataset_rows(_hub(name, split, streaming) if is_hub else _folder(path, split), name, needed)
        return Table(rows, path.name, Path() if is_hub else path)
    if split is not None:
        raise ValueError(f"split={split!r} has no effect on the file {name!r}; drop it")
    return Table(_file_rows(existing_file(path), needed), path.stem, path.parent)


def _file_rows(file: Path, needed: list[str]) -> Rows:
    if file.suffix in (".csv", ".tsv"):
        return _csv_rows(file, needed)
    if file.suffix == ".json":
        return json_records(file)
    if file.suffix == ".jsonl":
        return json_lines(file)
    if file.suffix == ".parquet":
        return _parquet_rows(file, needed)
    raise ValueError(f"{str(file)!r} ends in {file.suffix!r}; give one of {', '.join(_FILE_SUFFIXES)}")


def _check_columns(columns: Iterable[str], needed: list[str], name: str) -> None:
    given = list(columns)
    for column in needed:
        if column not in given:
            raise ValueError(f"{name!r} has no column {column!r}{closest(column, given)} (columns: {', '.join(given)})")


def _csv_rows(file: Path, needed: list[str]) -> Rows:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            columns = list(reader.fieldnames or ())
            _check_columns(columns, needed, str(file))
            for number, row in enumerate(reader, 1):
                # Where a row is too long or too short, DictReader uses None as name or as value.
                whole = None not in row and None not in row.values()
                yield number, row if whole else BadRecord("row has another number of fields than the header")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{str(file)!r} is not CSV: {error} at line {reader.line_num}; correct it there") from None


def _parquet_rows(file: Path, needed: list[str]) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{str(file)!r} needs a package; pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_columns(table.schema_arrow.names, needed, str(file))
            number = 0
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{str(file)!r} is not a parquet file: {' '.join(str(error).split())}; replace it") from None


def _folder(path: Path, split: str | None) -> Any:
    datasets = _datasets(str(path))
    index = path / "dataset_dict.json"
    if index.is_file():
        splits = json.loads(index.read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise ValueError(f"{str(path)!r} has no split {split!r}; choices: {', '.join(splits)}")
        return datasets.load_from_disk(str(path / str(split)))
    if split is not None:
        raise ValueError(f"split={split!r} has no effect on {str(path)!r}, which holds one data set; drop it")
    if not (path / "state.json").is_file():
        raise ValueError(f"folder {str(path)!r} was not written by save_to_disk of datasets; give a file in it")
    return datasets.load_from_disk(str(path))


def _hub(name: str, split: str | None, streaming: bool) -> Any:
    datasets = _datasets(name)
    if split is None:
        raise ValueError(f"{name!r} is not on the disk and a data set of the Hub needs a split; give split='train'")
    try:
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{name!r} is not on the disk and the Hub did not give it: {said}; check the name") from error


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data set {name!r} needs a package; pip install datasets") from error
    return datasets


def _dataset_rows(dataset: Any, name: str, needed: list[str]) -> Rows:
    # A streamed data set may not know its columns before its first row; then its rows are rejected one by one.
    if dataset.column_names is not None:
        _check_columns(dataset.column_names, needed, name)
        feature = (dataset.features or {}).get(needed[0])
        # Pictures stay files: decoding here would do the work twice and stop at the first broken one.
        if feature is not None and type(feature).__name__ == "Image":
            dataset = dataset.cast_column(needed[0], _datasets(name).Image(decode=False))
    yield from enumerate(dataset, 1)


def picture_of(row: dict[str, Any], column: str, folder: str | os.PathLike[str]) -> ImageSource:
    """The picture of a row: a file name, or the picture itself.

    Raises:
        BadRecord: neither is there, or no such file.
    """
    image = row.get(column)
    # The undecoded Image feature of datasets: the bytes of the file, or its path, or both.
    if isinstance(image, dict):
        data = image.get("bytes")
        image = image.get("path") if data is None else data
    if isinstance(image, PIL.Image.Image) or (isinstance(image, bytes) and image):
        return image
    return image_file(image, folder)


def group_of(id: str, image: ImageSource) -> str:
    """Identity of the picture without decoding it; a picture that is neither file nor bytes is its sample's own."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return image if isinstance(image, str) else id
