"""I3: left padding, right padding and no padding give the same, in one pass and in generation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eyespot.models.merge import positions_from_mask
from eyespot.models.vlm import VLM
from tiny import close, collate, make_row, make_rows


@torch.no_grad()
def logits(model: VLM, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_pass(vlm: VLM, side: str) -> None:
    rows = make_rows()
    batch = collate(rows, side)
    padded = logits(vlm, batch)
    for i, row in enumerate(rows):
        alone = logits(vlm, {name: value for name, value in collate([row]).items() if name != "attention_mask"})
        close(padded[i][batch["attention_mask"][i].bool()], alone[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_gives_nan(vlm: VLM, side: str) -> None:
    found = logits(vlm, collate(make_rows(), side))
    assert not found.isnan().any()


def test_generation(vlm: VLM) -> None:
    rows = make_rows()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    left, right = (vlm.generate(**collate(rows, side), **options)[:, -8:] for side in ("left", "right"))
    alone = torch.cat([vlm.generate(**collate([row]), **options)[:, -8:] for row in rows])
    assert torch.equal(left, alone)
    assert torch.equal(right, alone)
    assert len(alone.unique()) > 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_under_the_padding_does_not_matter(vlm: VLM, side: str) -> None:
    rows = make_rows()
    one, other = collate(rows, side, pad_id=0), collate(rows, side, pad_id=5)
    real = one["attention_mask"].bool()
    close(logits(vlm, one)[real], logits(vlm, other)[real])


def test_padding_twice_as_long_changes_nothing(vlm: VLM) -> None:
    """Longer than the sliding window of the Gemma models."""
    rows = [make_row("titt", 1), make_row("t" * 30, 2)]
    alone, padded = logits(vlm, collate(rows[:1])), logits(vlm, collate(rows, "left"))
    close(padded[0, -len(rows[0].ids) :], alone[0])


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 2, 3]]
