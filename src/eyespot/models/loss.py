"""Logits and loss, computed only where a label stands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from eyespot.models.fused_loss import fused_cross_entropy
from eyespot.models.head import head_product

IGNORE_INDEX = -100


def head_logits(language: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The language model's own logits from its last hidden states.

    hidden float [..., D] -> logits float [..., V]. Follows what causal language models of transformers do after the
    head: Gemma 2's soft cap (arXiv 2408.00118), Cohere's ``logit_scale`` and Granite's ``logits_scaling``.
    The hidden states are made two-dimensional first: a frozen head would otherwise be multiplied batch-wise, which
    copies its whole weight.
    """
    head = language.get_output_embeddings()
    assert isinstance(head, nn.Module)
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits: Tensor = head_product(rows, head.weight, head.bias) if type(head) is nn.Linear else head(rows)
    scale, cap = after_head(language)
    if scale != 1:
        logits = logits * scale
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits.reshape(*hidden.shape[:-1], -1)


def after_head(language: PreTrainedModel) -> tuple[float, float | None]:
    """What a language model does to its logits: a factor, and a soft cap or None."""
    config = language.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))
    return factor, getattr(config, "final_logit_softcapping", None)


def supervised_hidden(hidden: Tensor, labels: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The one place where labels are shifted: what predicts a token is the hidden state of the token before it.

    Args:
        hidden: float [B, T, D]. labels: int64 [B, T].
        previous: int64 [B, T], place in the row of the token before this one; by default the neighbour on the left.

    Returns:
        (hidden states float [S, D], targets int64 [S]) of the S supervised tokens.
    """
    supervised = labels != IGNORE_INDEX
    supervised[:, 0] = False  # nothing stands before the first token
    rows, places = supervised.nonzero(as_tuple=True)
    sources = places - 1 if previous is None else previous[rows, places]
    return hidden[rows, sources], labels[rows, places]


def causal_loss(
    language: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    previous: Tensor | None = None,
) -> Tensor:
    """Cross-entropy at the supervised positions.

    Args:
        language: the causal language model whose head is used.
        hidden: its last hidden states, float [B, T, D].
        labels: int64 [B, T], ``IGNORE_INDEX`` where nothing is to be learned; not shifted.
        num_items: what the summed loss is divided by; by default the number of supervised tokens here. Give the
            number over the whole global batch to make accumulation and data parallelism token-correct.
        previous: see ``supervised_hidden``.

    Returns:
        float32 scalar.

    Raises:
        ValueError: no position is supervised.
    """
    states, targets = supervised_hidden(hidden, labels, previous)
    if targets.numel() == 0:
        raise ValueError("no token of this batch is supervised; check the labels or raise the maximum length")
    head = language.get_output_embeddings()
    if type(head) is nn.Linear:
        scale, cap = after_head(language)
        total = fused_cross_entropy(states, head.weight, head.bias, targets.to(states.device), scale, cap)
    else:  # an adapted or quantized head
        logits = head_logits(language, states).float()
        total = F.cross_entropy(logits, targets.to(logits.device), reduction="sum")
    return total / (targets.numel() if num_items is None else num_items)
