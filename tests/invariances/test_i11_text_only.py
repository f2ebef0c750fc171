"""I11: without a picture the VLM is its language model; the placeholder beyond the vocabulary never comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eyespot.models.vlm import VLM
from tiny import NUM_PATCHES, VOCAB, close, collate, make_row, make_rows, make_vlm

TEXT_ROWS = [make_row("t" * 9, 1), make_row("t" * 4, 2), make_row("t" * 12, 3)]
WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 5.0},
    {"do_sample": True, "temperature": 3.0, "top_p": 0.9, "top_k": 60},
    {"do_sample": False, "repetition_penalty": 1.7},
    {"do_sample": True, "temperature": 2.0, "repetition_penalty": 0.5},
    {"do_sample": False, "num_beams": 4},
    {"do_sample": True, "temperature": 3.0, "num_beams": 2, "repetition_penalty": 1.3},
    {"do_sample": False, "no_repeat_ngram_size": 2},
]


@torch.no_grad()
def test_logits_are_the_language_models_own(vlm: VLM) -> None:
    batch = collate(TEXT_ROWS)
    for row in TEXT_ROWS:
        ids = torch.tensor([row.ids])
        close(vlm(input_ids=ids).logits[..., :VOCAB], vlm.language(input_ids=ids).logits)
    together = vlm(**batch).logits
    for i, row in enumerate(TEXT_ROWS):
        own = vlm.language(input_ids=torch.tensor([row.ids])).logits[0]
        close(together[i, : len(row.ids), :VOCAB], own)


def test_greedy_text_is_the_language_models_own(vlm: VLM) -> None:
    for row in TEXT_ROWS:
        ids = torch.tensor([row.ids])
        options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        own = vlm.language.generate(ids, attention_mask=mask, **options)
        assert torch.equal(vlm.generate(ids, attention_mask=mask, **options), own)


def test_hidden_states_come_through(vlm: VLM) -> None:
    ids = torch.tensor([TEXT_ROWS[0].ids])
    with torch.no_grad():
        ours = vlm(input_ids=ids, output_hidden_states=True).hidden_states
        own = vlm.language(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(own) == 3
    for one, other in zip(ours, own, strict=True):
        close(one, other)


@torch.no_grad()
def test_the_placeholder_beyond_the_vocabulary_is_impossible(vlm: VLM) -> None:
    logits = vlm(**collate(make_rows())).logits
    assert logits.shape[-1] == VOCAB + 1
    assert (logits[..., VOCAB] == float("-inf")).all()
    assert logits[..., :VOCAB].isfinite().all()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(name for name in way))
def test_the_placeholder_is_never_generated(way: dict[str, Any]) -> None:
    model = make_vlm("gpt")
    batch = collate([row for row in make_rows() for _ in range(4)], "left")
    torch.manual_seed(0)
    new = model.generate(**batch, **way, max_new_tokens=16, pad_token_id=0)[:, batch["input_ids"].shape[1] :]
    assert new.shape == (12, 16)
    assert int(new.max()) < VOCAB
    assert len(new.unique()) > 5


def test_an_id_far_beyond_the_vocabulary_works() -> None:
    """A tokenizer may have more tokens than the model has rows; the placeholder then stands behind both."""
    near, far = make_vlm("llama"), make_vlm("llama", image_token_id=VOCAB + 7)
    batch = collate(make_rows())
    moved = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == VOCAB, VOCAB + 7)}
    with torch.no_grad():
        logits = far(**moved).logits
        close(logits[..., :VOCAB], near(**batch).logits[..., :VOCAB])
    assert logits.shape[-1] == VOCAB + 8 and (logits[..., VOCAB:] == float("-inf")).all()


def test_a_text_only_row_takes_no_picture(vlm: VLM) -> None:
    """Pictures without placeholders, or placeholders without pictures, are errors with both numbers."""
    picture = make_row("tit", 1)
    with pytest.raises(ValueError, match=f"0 image placeholders but 1 images of {NUM_PATCHES} tokens"):
        vlm(input_ids=torch.tensor([TEXT_ROWS[0].ids]), pixel_values=picture.pixels)
    with pytest.raises(ValueError, match=f"{NUM_PATCHES} image placeholders but 0 images"):
        vlm(input_ids=torch.tensor([picture.ids]))
    with pytest.raises(ValueError, match=f"{NUM_PATCHES} image placeholders but 2 images"):
        vlm.generate(input_ids=torch.tensor([picture.ids]), pixel_values=picture.pixels.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        vlm()
