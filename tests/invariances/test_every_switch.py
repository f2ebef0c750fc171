"""I1, I2, I6, I7 and I8 at once: whatever is switched on together, loss and gradients are those of the plain form.

The plain form takes one sample at a time, encodes its pictures, computes adapters as peft does, makes logits for every
position and scores them with PyTorch's cross-entropy.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor

from eyespot.data.packing import fill_rows, pack, share_prefixes
from eyespot.models.lora_linear import LoRALinear
from eyespot.models.vlm import VLM
from eyespot.processing.processor import IGNORE_INDEX, Encoded
from tiny import VOCAB, close, make_row, make_vlm

Sample = tuple[Encoded, list[Tensor], Hashable]
LAYOUTS = ("tittttt", "tittt", "titt", "ttttttttt", "titttitt", "tttittttttttttt")
LORA = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}


def samples() -> list[Sample]:
    """The first three are about one picture; longer than the sliding windows of the tiny models."""
    rows = [make_row(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    for row in rows[1:3]:
        row.pixels, row.ids[0] = rows[0].pixels, rows[0].ids[0]
    keys = [0, 0, 0, 1, 2, 3]
    learned = [3, 2, 1, 4, 2, 5]
    return [
        (
            Encoded(row.ids, [IGNORE_INDEX] * (len(row.ids) - n) + row.ids[-n:], len(row.pixels)),
            list(row.pixels),
            key,
        )
        for row, key, n in zip(rows, keys, learned, strict=True)
    ]


def plain(model: VLM, given: list[Sample]) -> Tensor:
    total, count = torch.zeros(()), 0
    for encoded, images, _ in given:
        pixels = torch.stack(images) if images else None
        logits = model(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels).logits[0, :-1]
        targets = torch.tensor(encoded.labels[1:])
        total = total + F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        count += encoded.num_supervised
    loss = total / count
    loss.backward()
    return loss.detach()


def switched(model: VLM, given: list[Sample], *, packed: bool, cached: bool, num_parts: int) -> Tensor:
    count = sum(encoded.num_supervised for encoded, _, _ in given)
    total = torch.zeros(())
    size = -(-len(given) // num_parts)
    for start in range(0, len(given), size):
        part = given[start : start + size]
        if packed:
            batch, images = pack(fill_rows(share_prefixes(part, VOCAB, 48), 48), pad_id=0)
        else:
            width = max(len(e.input_ids) for e, _, _ in part)
            gaps = [width - len(e.input_ids) for e, _, _ in part]
            rows = list(zip(part, gaps, strict=True))
            batch = {
                "input_ids": torch.tensor([e.input_ids + [0] * gap for (e, _, _), gap in rows]),
                "labels": torch.tensor([e.labels + [IGNORE_INDEX] * gap for (e, _, _), gap in rows]),
                "attention_mask": torch.tensor([[1] * len(e.input_ids) + [0] * gap for (e, _, _), gap in rows]),
            }
            images = [image for _, of_sample, _ in part for image in of_sample]
        pictures = {"pixel_values": torch.stack(images)}
        if cached:
            with torch.no_grad():
                pictures = {"image_features": model.encode_images(pictures["pixel_values"])}
        loss = model(**batch, **pictures, num_items_in_batch=count).loss
        loss.backward()
        total += loss.detach()
    return total


@pytest.mark.parametrize("language", ["gpt", "llama", "gemma3", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_all_combinations(language: str, mode: str) -> None:
    adapters = {"lora": {"language": LORA}} if mode == "lora" else {}
    ours = make_vlm(language, **adapters)
    ours.set_trainable(vision="frozen", connector="full", language=mode)  # type: ignore[arg-type]
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide A
            torch.nn.init.normal_(parameter, std=0.1)
    reference = copy.deepcopy(ours)
    fused = [layer for layer in reference.modules() if isinstance(layer, LoRALinear)]
    assert bool(fused) == (mode == "lora")
    for layer in fused:
        layer.__class__ = Linear
    given = samples()
    wanted_loss = plain(reference, given)
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for packed, cached, num_parts, checkpointing in itertools.product(
        (False, True), (False, True), (1, 2), (False, True)
    ):
        model = copy.deepcopy(ours)
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model.train()
        what = f"packed={packed} cached={cached} parts={num_parts} checkpointing={checkpointing}"
        loss = switched(model, given, packed=packed, cached=cached, num_parts=num_parts)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5, msg=what)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys(), what
        for name, gradient in wanted.items():
            torch.testing.assert_close(
                found[name] / scale, gradient / scale, rtol=2e-5, atol=2e-5, msg=f"{what}: {name}"
            )


def test_the_comparison_sees_a_leak() -> None:
    """Branches that saw each other would change the loss by far more than rounding."""
    model, given = make_vlm("gemma3"), samples()
    batch, images = pack(fill_rows(share_prefixes(given, VOCAB, 48), 48), pad_id=0)
    pixels = torch.stack(images)
    right, leaking = (
        model(**{**batch, "branches": branches}, pixel_values=pixels).loss
        for branches in (batch["branches"], batch["branches"].clamp(max=1))
    )
    assert abs(float(right.detach()) - float(leaking.detach())) > 1e-3
    close(right.detach(), plain(copy.deepcopy(model), given))
