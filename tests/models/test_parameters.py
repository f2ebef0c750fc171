"""Counting parameters: by part, each weight once, packed weights as what they stand for."""

from __future__ import annotations

import io
from types import SimpleNamespace

import torch
from rich.console import Console
from torch import nn

from eyespot.models.parameters import count_parameters, logical_numel, parameter_table
from tiny import make_vlm


def test_rows_add_up_and_tied_weights_count_once() -> None:
    for language in ("llama", "gemma3"):
        model = make_vlm(language)
        rows = count_parameters(model)
        assert [row.part for row in rows] == ["vision", "connector", "language", "model"]
        distinct = {p.data_ptr(): p for p in model.parameters()}.values()
        assert rows[-1].total == sum(p.numel() for p in distinct)
        assert rows[-1].total == sum(row.total for row in rows[:-1])
        assert rows[-1].num_bytes == 4 * rows[-1].total
    tied = count_parameters(make_vlm("gemma3"))[2].total
    head = make_vlm("gemma3").get_output_embeddings().weight
    assert isinstance(head, torch.Tensor)
    untied = make_vlm("gemma3")
    untied.language.lm_head.weight = nn.Parameter(head.clone())
    assert count_parameters(untied)[2].total == tied + head.numel()


def test_trainable_and_bytes_follow_the_model() -> None:
    model = make_vlm("llama")
    model.set_trainable(vision="frozen", connector="full", language="frozen")
    model.language.to(torch.bfloat16)
    vision, connector, language, whole = count_parameters(model)
    assert (vision.trainable, language.trainable) == (0, 0)
    assert connector.trainable == connector.total == whole.trainable
    assert language.num_bytes == 2 * language.total and vision.num_bytes == 4 * vision.total


def test_packed_weights_count_as_what_they_stand_for() -> None:
    packed = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    assert logical_numel(packed) == 4
    packed.quant_state = SimpleNamespace(shape=torch.Size([4, 2]))  # type: ignore[attr-defined]
    assert logical_numel(packed) == 8


def test_the_table_shows_every_part() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(parameter_table(make_vlm("llama")))
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["part", "vision", "connector", "language", "model"]
    total = count_parameters(make_vlm("llama"))[-1]
    assert f"{total.total:,}" in lines[-1] and "MB" in lines[-1]
