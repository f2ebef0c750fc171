"""I4: generation with a cache = a full pass for every token = the teacher-forced arg max."""

from __future__ import annotations

import torch
from torch import Tensor

from eyespot.models.vlm import VLM
from tiny import VOCAB, close, collate, make_rows

NEW = 10


def generated(model: VLM, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return found


@torch.no_grad()
def test_cached_generation_is_full_recomputation(vlm: VLM) -> None:
    batch = collate(make_rows(), "left")
    sequences = generated(vlm, batch)
    prompt_length = batch["input_ids"].shape[1]
    assert torch.equal(sequences[:, :prompt_length], batch["input_ids"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(NEW):
        logits = vlm(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert torch.equal(sequences, ids)
    assert len(sequences[:, prompt_length:].unique()) > 3


@torch.no_grad()
def test_cached_generation_is_the_teacher_forced_arg_max(vlm: VLM) -> None:
    for row in make_rows():
        batch = collate([row])
        sequences = generated(vlm, batch)
        batch["attention_mask"] = torch.ones_like(sequences)
        logits = vlm(**{**batch, "input_ids": sequences}).logits
        start = len(row.ids)
        assert torch.equal(logits[:, start - 1 : -1].argmax(-1), sequences[:, start:])


@torch.no_grad()
def test_logits_of_cached_steps(vlm: VLM) -> None:
    """Token by token through the cache, left padding beside it: the same logits as in one pass."""
    batch = collate(make_rows(), "left")
    extra = torch.randint(1, VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([batch["input_ids"], extra], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(extra)], dim=1)
    whole = vlm(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"]).logits
    step = vlm(**batch, use_cache=True)
    found = [step.logits[:, -1]]
    for t in range(batch["input_ids"].shape[1], ids.shape[1]):
        step = vlm(
            input_ids=ids[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            past_key_values=step.past_key_values,
            use_cache=True,
        )
        found.append(step.logits[:, -1])
    # one row at a time and all at once are other kernels; on an AMD processor they differ by 1.4e-5
    close(torch.stack(found, dim=1), whole[:, batch["input_ids"].shape[1] - 1 :], 3e-5)


@torch.no_grad()
def test_a_following_question_may_use_the_cache_without_a_mask(vlm: VLM) -> None:
    """No mask, no padding: positions must go on where the cache ends."""
    row = make_rows()[0]
    batch = collate([row])
    del batch["attention_mask"]
    extra = torch.tensor([[3, 9, 4]])
    whole = vlm(**{**batch, "input_ids": torch.cat([batch["input_ids"], extra], 1)}).logits[:, -3:]
    past = vlm(**batch, use_cache=True).past_key_values
    close(vlm(input_ids=extra, past_key_values=past).logits, whole)


@torch.no_grad()
def test_logits_to_keep(vlm: VLM) -> None:
    batch = collate(make_rows(), "left")
    everything = vlm(**batch).logits
    close(vlm(**batch, logits_to_keep=2).logits, everything[:, -2:])
    close(vlm(**batch, logits_to_keep=torch.tensor([1, 4])).logits, everything[:, [1, 4]])
