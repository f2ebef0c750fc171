"""I7: the fused, chunked head and loss give the value and the gradients of full logits and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eyespot.models import fused_loss
from eyespot.models.fused_loss import fused_cross_entropy
from eyespot.models.loss import head_logits, supervised_hidden
from eyespot.models.vlm import VLM
from tiny import LANGUAGES, close, make_vlm, training_batch


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None
) -> Tensor:
    logits = F.linear(hidden, weight, bias).float() * scale
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="sum")


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 0.5)])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight", "hidden weight bias", "weight", ""])
def test_value_and_gradients(
    trained: str, scale: float, cap: float | None, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "CHUNK_ELEMENTS", 50 * rows_at_once)
    torch.manual_seed(0)
    values = {"hidden": torch.randn(7, 12), "weight": torch.randn(50, 12), "bias": torch.randn(50)}
    targets = torch.randint(50, (7,))
    results = []
    for function in (naive, fused_cross_entropy):
        leaves = {name: v.clone().requires_grad_(name in trained.split()) for name, v in values.items()}
        loss = function(leaves["hidden"], leaves["weight"], leaves["bias"], targets, scale, cap)
        if trained:
            (loss / 3).backward()
        results.append([loss.detach(), *(leaves[name].grad for name in trained.split())])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert found.dtype == wanted.dtype
        close(found, wanted, 1e-4)


def test_bfloat16_head_is_as_good_as_bfloat16_logits() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 64), torch.randn(40, 64) / 8
    targets = torch.randint(40, (9,))
    exact = hidden.clone().requires_grad_()
    naive(exact, weight, None, targets, 1.0, None).backward()
    low = hidden.bfloat16().requires_grad_()
    loss = fused_cross_entropy(low, weight.bfloat16(), None, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    close(loss.detach() / 9, naive(hidden, weight, None, targets, 1.0, None) / 9, 0.02)
    close(low.grad.float(), exact.grad, 0.05)


def test_an_empty_vocabulary_chunk_still_holds_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "CHUNK_ELEMENTS", 1)
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    close(fused_cross_entropy(hidden, weight, None, targets), naive(hidden, weight, None, targets, 1.0, None))


@pytest.mark.parametrize("name", sorted(LANGUAGES))
@pytest.mark.parametrize("frozen_head", [True, False])
def test_every_language_model_gets_the_gradients_of_full_logits(name: str, frozen_head: bool) -> None:
    """Tied and free heads, soft caps and scales of nine families; tied weights are also used as embeddings."""
    model = make_vlm(name).eval()  # GPT-2 has dropout
    model.requires_grad_(True)
    model.get_output_embeddings().requires_grad_(not frozen_head)
    batch = training_batch()
    wanted, gradients = full_logits(model, batch)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    close(loss.detach(), wanted)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(gradients)
    for key, gradient in gradients.items():
        close(found[key] / scale, gradient / scale)


def full_logits(model: VLM, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss from logits at every position, and its gradients."""
    plain = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model(**plain, skip_logits=True).last_hidden_state
    states, targets = supervised_hidden(hidden, batch["labels"].clone())
    loss = F.cross_entropy(head_logits(model.language, states).float(), targets)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
