"""I8: a question behind a prefix of keys and values that an earlier question left gets the answer of a full pass."""

from __future__ import annotations

import copy

import pytest
import torch

from eyespot.models.vlm import VLM
from tiny import VOCAB, make_row

NEW = 12


@pytest.mark.parametrize("layout", ["tittttttt", "titttitt", "ittttttttttt"])
@torch.no_grad()
def test_a_kept_prefix_changes_no_answer(vlm: VLM, layout: str) -> None:
    """Every language model of the suite, sliding windows shorter than the prefix included."""
    vlm.eval()
    row = make_row(layout, 3)
    features = vlm.encode_images(torch.stack(list(row.pixels)))
    length = max(place for place, token in enumerate(row.ids) if token == vlm.config.image_token_id) + 1
    kept = vlm.prefill(torch.tensor([row.ids[:length]]), features)
    answers = set()
    for seed in range(3):
        question = torch.randint(1, VOCAB, (len(row.ids) - length,), generator=torch.Generator().manual_seed(seed))
        ids = torch.tensor([row.ids[:length] + question.tolist()])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        whole = vlm.generate(ids, image_features=features, **options)
        reused = vlm.generate(
            ids, inputs_embeds=vlm.embed_text(ids), past_key_values=copy.deepcopy(kept), **options
        )  # fmt: skip
        assert torch.equal(whole, reused)
        assert torch.equal(whole, vlm.generate(ids, image_features=features, cache_implementation="static", **options))
        answers.add(tuple(whole[0, ids.shape[1] :].tolist()))
    assert kept.get_seq_length() == length, "the kept prefix was written to"
    assert len(answers) == 3
