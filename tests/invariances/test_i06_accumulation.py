"""I6, at the level of the model: micro-batches with the token count of the whole batch add up to the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eyespot.models.loss import IGNORE_INDEX, causal_loss
from eyespot.models.vlm import VLM
from tiny import LANGUAGES, NUM_LABELLED, close, make_vlm, training_batch


def gradients(model: VLM, batches: list[dict[str, Any]], num_items: int | None) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("language", list(LANGUAGES))
def test_micro_batches_add_up_to_the_batch(language: str) -> None:
    model = make_vlm(language)
    whole = training_batch([0, 1, 2, 3])
    num_items = int((whole["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert num_items == sum(NUM_LABELLED)
    expected, expected_grads = gradients(model, [whole], None)
    parts = [training_batch([0]), training_batch([1, 2]), training_batch([3])]
    actual, actual_grads = gradients(model, parts, num_items)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert actual_grads.keys() == expected_grads.keys() and len(expected_grads) > 20
    for name, grad in expected_grads.items():
        close(actual_grads[name], grad)


def test_a_mean_of_means_would_be_another_loss() -> None:
    """What the token weighting is for: these rows are unequal enough to show the difference."""
    model = make_vlm("llama")
    expected, _ = gradients(model, [training_batch([0, 1, 2, 3])], None)
    mean_of_means = sum(gradients(model, [training_batch([i])], None)[0] for i in range(4)) / 4
    assert mean_of_means != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("language", list(LANGUAGES))
def test_loss_is_the_cross_entropy_of_all_logits(language: str) -> None:
    """I7 without chunks: loss only at supervised positions = the textbook loss over the whole vocabulary."""
    model = make_vlm(language, image_token_id=63)
    batch = training_batch([0, 1, 2, 3])
    batch["input_ids"][batch["input_ids"] == 64] = 63
    output = model(**batch, skip_logits=False)
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX)
    close(output.loss, expected)
    head = model.get_output_embeddings().weight
    ours, theirs = (torch.autograd.grad(loss, head, retain_graph=True)[0] for loss in (output.loss, expected))
    close(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_the_loss(side: str) -> None:
    model = make_vlm("gemma3")
    with torch.no_grad():
        close(model(**training_batch([0, 1, 2, 3], side)).loss, model(**training_batch([3, 2, 1, 0], "right")).loss)


def test_no_logits_are_made_with_labels_unless_asked() -> None:
    model = make_vlm("llama")
    assert model(**training_batch([0])).logits is None
    assert model(**training_batch([0]), skip_logits=False).logits is not None


def test_a_batch_without_labels_is_an_error() -> None:
    batch = training_batch([0, 1])
    batch["labels"][:] = IGNORE_INDEX
    with pytest.raises(ValueError, match="no token of this batch is supervised"):
        make_vlm("llama")(**batch)
    model = make_vlm("llama")
    first_only = torch.tensor([[7, IGNORE_INDEX]])  # nothing predicts the first token
    with pytest.raises(ValueError, match="no token of this batch is supervised"):
        causal_loss(model.language, torch.zeros(1, 2, 32), first_only)
