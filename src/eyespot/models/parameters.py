"""How many parameters, where, and how much memory they take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from eyespot.models.vlm import PARTS


@dataclass(frozen=True)
class ParameterRow:
    """One part: parameters in all, trainable ones, and the bytes that hold them."""

    part: str
    total: int
    trainable: int
    num_bytes: int


def logical_numel(parameter: nn.Parameter) -> int:
    """Real number of weights of a parameter; a packed 4-bit one (bitsandbytes) holds two in each byte."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    return parameter.numel()


def count_parameters(model: nn.Module) -> list[ParameterRow]:
    """Rows for vision, connector, language and the heads that there are, and their sum. A tied weight counts once."""
    rows = []
    for part in PARTS:
        if (module := getattr(model, part)) is None:
            continue
        parameters = list(module.parameters())
        rows.append(
            ParameterRow(
                part,
                sum(logical_numel(p) for p in parameters),
                sum(logical_numel(p) for p in parameters if p.requires_grad),
                sum(p.numel() * p.element_size() for p in parameters),
            )
        )
    sums = (sum(getattr(row, name) for row in rows) for name in ("total", "trainable", "num_bytes"))
    return [*rows, ParameterRow("model", *sums)]


def parameter_table(model: nn.Module) -> Table:
    """The counts as a table for the terminal."""
    table = Table(box=None, pad_edge=False)
    for name in ("part", "parameters", "trainable", "memory"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in count_parameters(model):
        table.add_row(row.part, f"{row.total:,}", f"{row.trainable:,}", f"{row.num_bytes / 1e6:,.1f} MB")
    return table
