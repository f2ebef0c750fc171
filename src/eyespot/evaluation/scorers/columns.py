"""Columns of an evaluation: predictions, truths, kinds, with one entry for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Scores = TypeVar("Scores")


def check_columns(**columns: Sequence[Any]) -> None:
    """That there is at least one sample, and as many entries in every column.

    Raises:
        ValueError: there are none, their numbers differ, or a column is one text.
    """
    for name, column in columns.items():
        if isinstance(column, str):
            raise ValueError(  # noqa: TRY004  bad data is always a ValueError
                f"{name} is the text {column!r}; give a list with one entry for each sample"
            )
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"there are {counts}; give as many of each")
    if not all(map(len, columns.values())):
        raise ValueError("there are 0 samples, at least 1 is needed; check the split and the filters")


def by_kind(score: Callable[..., Scores], kinds: Sequence[str], *columns: Sequence[Any]) -> dict[str, Scores]:
    """Any scorer, over the samples of each kind alone; kinds in the order in which they are met first.

    For instance POPE's three splits, ``by_kind(pope.score, splits, predictions, truths)``, or VQAv2's three types of
    answer. CIDEr-D of a part weighs words by how rare they are in that part.

    Raises:
        ValueError: as ``check_columns``.
    """
    check_columns(kinds=kinds, **{f"entries of column {number}": column for number, column in enumerate(columns, 1)})
    rows: dict[str, list[int]] = {}
    for row, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(row)
    return {kind: score(*([column[row] for row in chosen] for column in columns)) for kind, chosen in rows.items()}
