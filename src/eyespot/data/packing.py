"""Several samples in one row: documents side by side, all texts about the same pictures behind one image prefix.

A document is a tree of depth one: a prefix, then branches. Every branch sees the prefix and itself, and its positions
go on from the prefix, so each sample computes what it would compute alone (invariances I1 and I2).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eyespot.processing.processor import IGNORE_INDEX, Encoded


@dataclass
class Document:
    """A prefix shared by branches; without sharing the whole sample is the prefix.

    images: those of the prefix. members: which sample each branch, or the whole, comes from.
    """

    prefix: Encoded
    branches: list[Encoded] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    members: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prefix.input_ids) + sum(len(branch.input_ids) for branch in self.branches)


def share_prefixes(
    rows: Sequence[tuple[Encoded, list[Any], Hashable]], image_token_id: int, max_length: int
) -> list[Document]:
    """Encoded samples -> documents; samples with the same pictures share everything up to the last image token.

    Args:
        rows: (encoded, pictures, key that is equal for equal pictures) of each sample.
        image_token_id: placeholder id.
        max_length: a document does not grow beyond it by sharing (a longer sample stays alone).
    """
    documents: list[Document] = []
    open_documents: dict[Hashable, Document] = {}
    for number, (encoded, images, key) in enumerate(rows):
        cut = _prefix_length(encoded, image_token_id)
        if cut == 0:
            documents.append(Document(encoded, [], images, [number]))
            continue
        prefix, branch = _split(encoded, cut)
        tree_key = (key, tuple(prefix.input_ids))
        document = open_documents.get(tree_key)
        if document is None or len(document) + len(branch.input_ids) > max_length:
            document = Document(prefix, [], images)
            open_documents[tree_key] = document
            documents.append(document)
        document.branches.append(branch)
        document.members.append(number)
    return documents


def _prefix_length(encoded: Encoded, image_token_id: int) -> int:
    """Tokens up to the last image token; 0 when something before it is learned or nothing comes after it."""
    if encoded.num_images == 0:
        return 0
    cut = len(encoded.input_ids) - encoded.input_ids[::-1].index(image_token_id)
    learned_before = any(label != IGNORE_INDEX for label in encoded.labels[:cut])
    return 0 if learned_before or cut == len(encoded.input_ids) else cut


def _split(encoded: Encoded, cut: int) -> tuple[Encoded, Encoded]:
    ids, labels = encoded.input_ids, encoded.labels
    return Encoded(ids[:cut], labels[:cut], encoded.num_images), Encoded(ids[cut:], labels[cut:], 0)


def fill_rows(documents: Sequence[Document], max_length: int) -> list[list[Document]]:
    """Documents into few rows of at most ``max_length`` tokens, and those as equally long as can be.

    A batch is as wide as its longest row, so what is wasted is the difference. A document longer than ``max_length``
    gets a row of its own.
    """
    rows = best_fit(documents, max_length)
    low = max(max(map(len, documents)), -(-sum(map(len, documents)) // len(rows)))
    high = max_length
    while low < high:  # the smallest capacity that needs no further row
        capacity = (low + high) // 2
        tried = best_fit(documents, capacity)
        if len(tried) <= len(rows):
            rows, high = tried, capacity
        else:
            low = capacity + 1
    return rows


def best_fit(documents: Sequence[Document], capacity: int) -> list[list[Document]]:
    """Longest first, each into the fullest row that takes it.

    Best-fit decreasing (Johnson 1973) stays within 11/9 of the fewest possible rows.
    """
    rows: list[list[Document]] = []
    lengths: list[int] = []
    for document in sorted(documents, key=len, reverse=True):
        fitting = [i for i, length in enumerate(lengths) if length + len(document) <= capacity]
        if fitting:
            best = max(fitting, key=lambda i: lengths[i])
            rows[best].append(document)
            lengths[best] += len(document)
        else:
            rows.append([document])
            lengths.append(len(document))
    return rows


def row_columns(documents: Sequence[Document]) -> dict[str, list[int]]:
    """One row as columns of equal length; ``previous`` is the place of the token that predicts this one."""
    columns: dict[str, list[int]] = {
        name: [] for name in ("input_ids", "labels", "position_ids", "documents", "branches", "previous")
    }
    for number, document in enumerate(documents):
        prefix_start = len(columns["input_ids"])
        prefix_length = len(document.prefix.input_ids)
        for branch_number, piece in enumerate([document.prefix, *document.branches]):
            start = len(columns["input_ids"])
            length = len(piece.input_ids)
            first_position = prefix_length if branch_number else 0
            columns["input_ids"] += piece.input_ids
            # nothing stands before the first token of a document that could predict it
            columns["labels"] += piece.labels if branch_number else [IGNORE_INDEX, *piece.labels[1:]]
            columns["position_ids"] += range(first_position, first_position + length)
            columns["documents"] += [number] * length
            columns["branches"] += [branch_number] * length
            before_first = prefix_start + prefix_length - 1 if branch_number else start
            columns["previous"] += [before_first, *range(start, start + length - 1)]
    return columns


PADDING = {"labels": IGNORE_INDEX, "documents": -1, "position_ids": 0, "branches": 0, "previous": 0}


def last_places(documents: Sequence[Document]) -> list[tuple[int, int]]:
    """(sample, place of its last token) of all samples in the row that ``row_columns`` makes of the documents."""
    places = []
    end = 0
    for document in documents:
        end += len(document.prefix.input_ids)
        if not document.branches:
            places.append((document.members[0], end - 1))
        for member, branch in zip(document.members, document.branches, strict=False):
            end += len(branch.input_ids)
            places.append((member, end - 1))
    return places


def pack(rows: Sequence[Sequence[Document]], pad_id: int) -> tuple[dict[str, Tensor], list[Any]]:
    """Rows of documents -> (columns int64 [R, T], pictures in the order of their placeholders)."""
    columns = [row_columns(row) for row in rows]
    longest = max(len(column["input_ids"]) for column in columns)
    batch = {
        name: torch.tensor(
            [column[name] + [PADDING.get(name, pad_id)] * (longest - len(column[name])) for column in columns]
        )
        for name in columns[0]
    }
    return batch, [image for row in rows for document in row for image in document.images]
