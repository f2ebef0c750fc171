"""Who may look at whom in rows that hold several texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

KERNELS = ("sdpa", "eager")  # those that take a ready mask
LAYER_TYPES = {"full_attention", "sliding_attention"}


def structure_mask(
    documents: Tensor,
    branches: Tensor,
    position_ids: Tensor,
    window: int | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """The mask of rows in which documents lie side by side, each a prefix with branches.

    A token sees itself and, before it, the prefix of its document (branch 0) and its own branch; nothing else. With a
    window, only tokens less than ``window`` positions away (positions, not places: branches lie far from their prefix).

    Args:
        documents: int64 [B, T], -1 on padding. branches: int64 [B, T], 0 on a prefix.
        position_ids: int64 [B, T]. window: of a sliding-attention layer.
        num_queries: Q, only the last columns ask, the others are in a cache; by default all, Q = T.

    Returns:
        bool [B, 1, Q, T], True where a query (third axis) sees a key (last axis); padding sees itself only.
    """
    places = torch.arange(documents.shape[1], device=documents.device)
    asking = slice(0 if num_queries is None else -num_queries, None)

    def keys(x: Tensor) -> Tensor:
        return x.unsqueeze(-2)

    def queries(x: Tensor) -> Tensor:
        return x[..., asking].unsqueeze(-1)

    visible = (keys(documents) == queries(documents)) & (queries(documents) >= 0) & (keys(places) <= queries(places))
    visible &= (keys(branches) == 0) | (keys(branches) == queries(branches))
    if window is not None:
        visible &= keys(position_ids) > queries(position_ids) - window
    # a fully masked row would be NaN under softmax
    return (visible | (keys(places) == queries(places))).unsqueeze(1)


def separable(config: PreTrainedConfig) -> bool:
    """Whether a mask can keep the texts of a row apart in every layer of a language model."""
    types = set(getattr(config, "layer_types", None) or [])
    return config._attn_implementation in KERNELS and types <= LAYER_TYPES


def attention_argument(
    config: PreTrainedConfig,
    documents: Tensor,
    branches: Tensor,
    position_ids: Tensor,
    dtype: torch.dtype,
    num_queries: int | None = None,
) -> Any:
    """What a language model of transformers takes as attention_mask for such rows: one mask, or one by layer type.

    Args:
        config: of the language model. dtype: of its activations, for kernels that add the mask.
        documents, branches, position_ids, num_queries: see ``structure_mask``.

    Raises:
        ValueError: the model's attention kernel takes no ready mask, or it has layers that no mask can separate.
    """
    kernel = config._attn_implementation
    if kernel not in KERNELS:
        raise ValueError(
            f"packed rows need attention kernel sdpa or eager, not {kernel!r}; load the model with one of them"
        )
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or []

    def mask(window: int | None) -> Tensor:
        visible = structure_mask(documents, branches, position_ids, window, num_queries)
        if kernel == "sdpa":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    if not types:
        return mask(window)
    if unknown := set(types) - LAYER_TYPES:
        raise ValueError(
            f"{config.model_type} has layers of type {sorted(unknown)[0]!r}, which cannot be packed; "
            "set data.packing=false"
        )
    if "sliding_attention" not in types:
        return mask(None)
    return {"full_attention": mask(None), "sliding_attention": mask(window)}
