"""I5: a batch of two is two batches of one, in any order and beside any neighbour."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from eyespot.models.vlm import VLM
from tiny import close, collate, make_rows


@torch.no_grad()
def test_any_order_and_any_neighbour(vlm: VLM) -> None:
    rows = make_rows()
    alone = [vlm(**collate([row])).logits[0] for row in rows]
    for order in itertools.chain(itertools.permutations(range(3), 2), itertools.permutations(range(3), 3)):
        batch = collate([rows[i] for i in order], "left")
        logits = vlm(**batch).logits
        for place, i in enumerate(order):
            close(logits[place, -len(rows[i].ids) :], alone[i])


def test_generation_in_any_order(vlm: VLM) -> None:
    rows = make_rows()

    def answers(order: tuple[int, ...]) -> Tensor:
        batch = collate([rows[i] for i in order], "left")
        found: Tensor = vlm.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, -6:]
        return found

    alone = torch.cat([answers((i,)) for i in range(3)])
    for order in itertools.permutations(range(3)):
        assert torch.equal(answers(order), alone[list(order)])


def test_beams_keep_each_row_with_its_own_pictures(vlm: VLM) -> None:
    """The second row has two pictures and the first none: repeated rows must not swap them."""
    rows = make_rows()
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    together = vlm.generate(**collate(rows, "left"), **options)[:, -5:]
    alone = torch.cat([vlm.generate(**collate([row]), **options)[:, -5:] for row in rows])
    assert torch.equal(together, alone)


@torch.no_grad()
def test_another_picture_changes_only_its_own_row(vlm: VLM) -> None:
    rows = make_rows()
    before = vlm(**collate(rows, "left")).logits
    rows[0].pixels = rows[0].pixels + 1
    after = vlm(**collate(rows, "left")).logits
    close(after[1:], before[1:])
    assert not torch.allclose(after[0], before[0], atol=1e-3)


@torch.no_grad()
def test_features_encoded_before_are_the_same_as_pixels(vlm: VLM) -> None:
    batch = collate(make_rows(), "left")
    pixels = batch.pop("pixel_values")
    features = vlm.encode_images(pixels)
    close(vlm(**batch, image_features=features).logits, vlm(**batch, pixel_values=pixels).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = vlm.generate(**batch, image_features=features, **options)
    assert torch.equal(cached, vlm.generate(**batch, pixel_values=pixels, **options))
