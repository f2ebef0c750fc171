"""I8: questions asked together, several behind one image prefix, get the answers of transformers' generate."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch
from torch import Tensor

from eyespot.branching import can_branch, greedy
from eyespot.models.vlm import VLM
from eyespot.processing.processor import IGNORE_INDEX, Encoded
from tiny import VOCAB, make_row, make_vlm

LAYOUTS = ["tittttt", "tittt", "titt", "ttttttttt", "ttt", "titttitt", "ttittttttttttt", "ti"]
NEW = 9


def prompts() -> list[tuple[Encoded, list[Tensor], Hashable]]:
    """Prompts with one picture, two and none; the first three are about the same picture."""
    rows = [make_row(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    for row in rows[1:3]:
        row.pixels, row.ids[0] = rows[0].pixels, rows[0].ids[0]
    keys = ["shared"] * 3 + list(range(3, len(rows)))
    return [
        (Encoded(row.ids, [IGNORE_INDEX] * len(row.ids), len(row.pixels)), list(row.pixels), key)
        for row, key in zip(rows, keys, strict=True)
    ]


def alone(model: VLM, encoded: Encoded, pictures: list[Tensor], ends: list[int]) -> list[int]:
    ids = torch.tensor([encoded.input_ids])
    pixels = torch.stack(pictures) if pictures else None
    sequence = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=NEW, do_sample=False,
        eos_token_id=ends or None, pad_token_id=0,
    )  # fmt: skip
    new: list[int] = sequence[0, ids.shape[1] :].tolist()
    return new[: next((i for i, token in enumerate(new) if token in ends), len(new))]


def together(model: VLM, ends: list[int]) -> list[list[int]]:
    return greedy(model, prompts(), lambda images: model.encode_images(torch.stack(images)), NEW, ends, 0)


def test_shared_prefix_answers_are_those_of_generate(vlm: VLM) -> None:
    """Every language model of the suite, sliding windows shorter than the prompt included."""
    vlm.eval()
    free = together(vlm, [])
    assert free == [alone(vlm, encoded, pictures, []) for encoded, pictures, _ in prompts()]
    assert len({tuple(answer) for answer in free}) > 4, "answers that are all alike would prove nothing"
    ends = sorted({answer[i] for i, answer in enumerate(free)})[:3]  # some end early, some late, some never
    assert together(vlm, ends) == [alone(vlm, encoded, pictures, ends) for encoded, pictures, _ in prompts()]


def test_short_rows_cut_prefixes_but_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_vlm().eval()
    whole = together(model, [])
    monkeypatch.setattr("eyespot.branching.ROW_LENGTH", 12)
    assert together(model, []) == whole


def test_a_kernel_without_ready_masks_cannot_branch() -> None:
    model = make_vlm()
    assert can_branch(model)
    model.language.config._attn_implementation = "flash_attention_2"
    assert not can_branch(model)
    assert model.config.image_token_id == VOCAB
