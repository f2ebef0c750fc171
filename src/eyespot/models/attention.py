"""Who may look at whom in rows that hold several texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def structure_mask(documents: Tensor, branches: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """The mask of rows in which documents lie side by side, each a prefix with branches.

    A token sees itself and, before it, the prefix of its document (branch 0) and its own branch; nothing else. With a
    window, only tokens less than ``window`` positions away (positions, not places: branches lie far from their prefix).

    Args:
        documents: int64 [B, T], -1 on padding. branches: int64 [B, T], 0 on a prefix.
        position_ids: int64 [B, T]. window: of a sliding-attention layer.

    Returns:
        bool [B, 1, T, T], True where a query (third axis) sees a key (last axis); padding sees itself only.
    """
    same_document = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    key_branch, query_branch = branches.unsqueeze(-2), branches.unsqueeze(-1)
    visible = same_document & ((key_branch == 0) | (key_branch == query_branch)) & (documents >= 0).unsqueeze(-1)
    length = documents.shape[1]
    visible &= torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    if window is not None:
        visible &= position_ids.unsqueeze(-2) > position_ids.unsqueeze(-1) - window
    # a fully masked row would be NaN under softmax
    return (visible | torch.eye(length, dtype=torch.bool, device=documents.device)).unsqueeze(1)


def attention_argument(
    config: PreTrainedConfig, documents: Tensor, branches: Tensor, position_ids: Tensor, dtype: torch.dtype
) -> Any:
    """What a language model of transformers takes as attention_mask for such rows: one mask, or one by layer type.

    Args:
        config: of the language model. dtype: of its activations, for kernels that add the mask.

    Raises:
        ValueError: the model's attention kernel takes no ready mask.
    """
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise ValueError(
            f"packed rows need attention kernel sdpa or eager, not {kernel!r}; load the model with one of them"
        )
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or []

    def mask(window: int | None) -> Tensor:
        visible = structure_mask(documents, branches, position_ids, window)
        if kernel == "sdpa":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    if not types:
        return mask(window)
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{config.model_type} has layers of type {sorted(unknown)[0]!r}, which cannot be packed; "
            "set data.packing=false"
        )
    if "sliding_attention" not in types:
        return mask(None)
    return {"full_attention": mask(None), "sliding_attention": mask(window)}
