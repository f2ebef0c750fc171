"""I1 and I2: packed = padded = one by one, and texts behind a shared picture = each asked alone."""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eyespot.data.packing import fill_rows, pack, row_columns, share_prefixes
from eyespot.models.attention import block_mask, structure_mask
from eyespot.models.vlm import VLM
from eyespot.processing.processor import IGNORE_INDEX, Encoded
from tiny import VOCAB, Row, close, make_row, make_vlm

LAYOUTS = ["tittttt", "tittt", "titt", "ttttttttt", "ttt", "titttitt", "ttittttttttttt"]


def encoded(row: Row, num_learned: int = 2) -> Encoded:
    labels = [IGNORE_INDEX] * (len(row.ids) - num_learned) + row.ids[-num_learned:]
    return Encoded(row.ids, labels, len(row.pixels))


def samples() -> list[tuple[Encoded, list[Tensor], Hashable]]:
    """Rows with one picture, two and none; the first three share theirs."""
    rows = [make_row(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    for row in rows[1:3]:
        row.pixels = rows[0].pixels
        row.ids[0] = rows[0].ids[0]
    keys = ["shared"] * 3 + list(range(3, len(rows)))
    return [(encoded(row), list(row.pixels), key) for row, key in zip(rows, keys, strict=True)]


def alone(model: VLM, sample: Encoded, images: list[Tensor]) -> Any:
    pixels = torch.stack(images) if images else None
    ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
    return model(input_ids=ids, pixel_values=pixels, labels=labels, num_items_in_batch=1, skip_logits=False)


def together(model: VLM, max_length: int, *, share: bool) -> tuple[Any, dict[str, Tensor], list[Any]]:
    rows = samples() if share else [(e, images, i) for i, (e, images, _) in enumerate(samples())]
    documents = share_prefixes(rows, VOCAB, max_length)
    batch, images = pack(fill_rows(documents, max_length), pad_id=0)
    output = model(**batch, pixel_values=torch.stack(images), num_items_in_batch=1, skip_logits=False)
    return output, batch, documents


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("max_length", [8, 40, 200])
def test_packed_logits_are_those_of_each_sample_alone(vlm: VLM, max_length: int, share: bool) -> None:
    packed, batch, _ = together(vlm, max_length, share=share)
    expected = []
    for sample, images, _ in samples():
        logits = alone(vlm, sample, images).logits[0]
        # the logits that predict a learned token, keyed by the words before it
        expected += [logits[t - 1] for t, label in enumerate(sample.labels) if t and label != IGNORE_INDEX]
    rows, places = (batch["labels"] != IGNORE_INDEX).nonzero(as_tuple=True)
    found = packed.logits[rows, batch["previous"][rows, places]]
    assert len(found) == len(expected)
    distances = torch.cdist(found[:, :VOCAB].double(), torch.stack(expected)[:, :VOCAB].double())
    close(distances.min(dim=1).values, torch.zeros(len(found), dtype=torch.float64), 1e-4)
    close(distances.min(dim=0).values, torch.zeros(len(found), dtype=torch.float64), 1e-4)


@pytest.mark.parametrize("share", [False, True])
def test_packed_loss_and_gradients_are_the_sum_of_the_samples(vlm: VLM, share: bool) -> None:
    vlm.requires_grad_(True)
    total = torch.zeros(())
    for sample, images, _ in samples():
        total = total + alone(vlm, sample, images).loss
    total.backward()
    wanted = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad()
    packed, _, _ = together(vlm, 40, share=share)
    packed.loss.backward()
    close(packed.loss.detach(), total.detach())
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, parameter in vlm.named_parameters():
        if name in wanted:
            close(parameter.grad / scale, wanted[name] / scale)
    vlm.zero_grad()


def test_sharing_encodes_a_picture_once_and_saves_its_tokens() -> None:
    shared, lone = (together(make_vlm(), 200, share=share) for share in (True, False))
    assert len(shared[2]) == len(lone[2]) - 2
    # 5 samples with pictures alone hold 7 pictures; three of them share one
    assert shared[0].image_embeds.shape[0] == lone[0].image_embeds.shape[0] - 2


def test_a_branch_sees_its_prefix_and_itself_only() -> None:
    columns = row_columns(share_prefixes(samples()[:3], VOCAB, 200))
    documents, branches, positions = (torch.tensor([columns[n]]) for n in ("documents", "branches", "position_ids"))
    mask = structure_mask(documents, branches, positions)[0, 0]
    for query in range(len(columns["branches"])):
        seen = {columns["branches"][key] for key in mask[query].nonzero().flatten().tolist()}
        assert seen <= {0, columns["branches"][query]}
        assert mask[query, query]
    first_of_branches = [i for i, b in enumerate(columns["branches"]) if b and columns["branches"][i - 1] != b]
    prefix_length = columns["branches"].count(0)
    assert [columns["position_ids"][i] for i in first_of_branches] == [prefix_length] * 3
    assert [columns["previous"][i] for i in first_of_branches] == [prefix_length - 1] * 3


def test_a_sliding_window_counts_positions_not_places() -> None:
    columns = row_columns(share_prefixes(samples()[:3], VOCAB, 200))
    documents, branches, positions = (torch.tensor([columns[n]]) for n in ("documents", "branches", "position_ids"))
    mask = structure_mask(documents, branches, positions, window=3)[0, 0]
    last_branch = [i for i, b in enumerate(columns["branches"]) if b == 3]
    distances = [
        columns["position_ids"][last_branch[0]] - columns["position_ids"][k] for k in mask[last_branch[0]].nonzero()
    ]
    assert sorted(distances) == [0, 1, 2]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(10, 80))
@settings(max_examples=60, deadline=None)
def test_rows_hold_every_document_once_within_the_limit(lengths: list[int], max_length: int) -> None:
    documents = share_prefixes([(Encoded([1] * n, [1] * n, 0), [], i) for i, n in enumerate(lengths)], VOCAB, 100)
    rows = fill_rows(documents, max_length)
    assert sorted(len(d) for row in rows for d in row) == sorted(lengths)
    assert all(len(row) == 1 or sum(map(len, row)) <= max_length for row in rows)


def test_easy_vqa_like_lengths_waste_under_five_percent() -> None:
    rng = random.Random(0)
    documents = share_prefixes(
        [(Encoded([1] * n, [1] * n, 0), [], i) for i, n in enumerate(rng.choices(range(8, 60), k=400))], VOCAB, 256
    )
    rows = fill_rows(documents, 256)
    assert sum(map(len, documents)) / (256 * len(rows)) > 0.95


def test_rows_are_evened_out_rather_than_padded() -> None:
    documents = share_prefixes([(Encoded([1] * 10, [1] * 10, 0), [], i) for i in range(28)], VOCAB, 100)
    assert sorted(sum(map(len, row)) for row in fill_rows(documents, 256)) == [140, 140]


def test_the_last_queries_get_the_last_rows_of_the_mask() -> None:
    columns = row_columns(share_prefixes(samples()[:3], VOCAB, 200))
    structure = [torch.tensor([columns[n]]) for n in ("documents", "branches", "position_ids")]
    for window in (None, 3):
        whole = structure_mask(*structure, window=window)
        assert torch.equal(structure_mask(*structure, window=window, num_queries=4), whole[:, :, -4:])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_queries", [None, 5])
def test_flex_attention_gets_the_same_mask(window: int | None, num_queries: int | None) -> None:
    from torch.nn.attention.flex_attention import create_mask

    batch, _ = pack(fill_rows(share_prefixes(samples(), VOCAB, 40), 40), pad_id=0)
    structure = [batch[n] for n in ("documents", "branches", "position_ids")]
    wanted = structure_mask(*structure, window=window, num_queries=num_queries)
    flex = block_mask(*structure, window=window, num_queries=num_queries)
    rows, _, queries, keys = wanted.shape
    assert tuple(flex.shape) == (rows, 1, queries, keys)
    assert torch.equal(create_mask(flex.mask_mod, rows, 1, queries, keys, device="cpu"), wanted)


def test_the_first_token_of_a_packed_document_is_not_learned() -> None:
    documents = share_prefixes([(Encoded([5, 6], [5, 6], 0), [], i) for i in range(2)], VOCAB, 100)
    batch, _ = pack(fill_rows(documents, 100), pad_id=0)
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, IGNORE_INDEX, 6]]


def test_kernels_without_ready_masks_are_refused() -> None:
    model = make_vlm()
    model.language.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="packed rows need attention kernel sdpa, eager, flex_attention, not 'flash"):
        together(model, 40, share=True)


def test_eager_attention_gives_the_same_packed_loss() -> None:
    model = make_vlm("gemma3")
    wanted = together(model, 40, share=True)[0].loss
    model.language.set_attn_implementation("eager")
    close(together(model, 40, share=True)[0].loss, wanted)
