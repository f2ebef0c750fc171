"""Who may look at whom in rows that hold several texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

MASK_KERNELS = ("sdpa", "eager")  # those that take a mask of all pairs
KERNELS = (*MASK_KERNELS, "flex_attention")
LAYER_TYPES = {"full_attention", "sliding_attention"}
Columns = tuple[Tensor, Tensor, Tensor, Tensor]


def sees(query: Columns, key: Columns, window: int | None) -> Tensor:
    """Who may look at whom, element by element; each column is (place, document, branch, position).

    A token sees itself and, before it, the prefix of its document (branch 0) and its own branch; nothing else. With a
    window, only tokens less than ``window`` positions away (positions, not places: branches lie far from their prefix).
    Padding (document -1) sees itself only: a fully masked row would be NaN under softmax.
    """
    place, document, branch, position = query
    key_place, key_document, key_branch, key_position = key
    visible = (key_document == document) & (document >= 0) & (key_place <= place)
    visible = visible & ((key_branch == 0) | (key_branch == branch))
    if window is not None:
        visible = visible & (key_position > position - window)
    return visible | (key_place == place)


def structure_mask(
    documents: Tensor,
    branches: Tensor,
    position_ids: Tensor,
    window: int | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """The mask of rows in which documents lie side by side, each a prefix with branches (see ``sees``).

    Args:
        documents: int64 [B, T], -1 on padding. branches: int64 [B, T], 0 on a prefix.
        position_ids: int64 [B, T]. window: of a sliding-attention layer.
        num_queries: Q, only the last columns ask, the others are in a cache; by default all, Q = T.

    Returns:
        bool [B, 1, Q, T], True where a query (third axis) sees a key (last axis).
    """
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    columns = (places, documents, branches, position_ids)
    asking = slice(0 if num_queries is None else -num_queries, None)
    queries: Any = tuple(column[:, asking].unsqueeze(-1) for column in columns)
    keys: Any = tuple(column.unsqueeze(-2) for column in columns)
    return sees(queries, keys, window).unsqueeze(1)


def block_mask(
    documents: Tensor,
    branches: Tensor,
    position_ids: Tensor,
    window: int | None = None,
    num_queries: int | None = None,
) -> Any:
    """``structure_mask`` for FlexAttention (arXiv 2412.05496), which skips blocks of pairs that are masked whole."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = documents.shape[1]
    places = torch.arange(length, device=documents.device).expand_as(documents).contiguous()
    columns = (places, documents, branches, position_ids)
    first = 0 if num_queries is None else length - num_queries

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(
            tuple(column[row, query + first] for column in columns),  # type: ignore[arg-type]
            tuple(column[row, key] for column in columns),  # type: ignore[arg-type]
            window,
        )

    return create_block_mask(visible, documents.shape[0], None, length - first, length, device=str(documents.device))


def separable(config: PreTrainedConfig) -> bool:
    """Whether a mask can keep the texts of a row apart in every layer of a language model, also while a cache grows."""
    types = set(getattr(config, "layer_types", None) or [])
    return config._attn_implementation in MASK_KERNELS and types <= LAYER_TYPES


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
            f"packed rows need attention kernel {', '.join(KERNELS)}, not {kernel!r}; load the model with one of them"
        )
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or []

    def mask(window: int | None) -> Any:
        if kernel == "flex_attention":
            return block_mask(documents, branches, position_ids, window, num_queries)
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
