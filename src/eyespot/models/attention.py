"""Who may look at whom in rows that hold several texts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedConfig

MASK_KERNELS = ("sdpa", "eager")  # those that take a mask of all pairs
KERNELS = (*MASK_KERNELS, "flex_attention")
LAYER_TYPES = {"full_attention", "sliding_attention"}
Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def sees(query: Columns, key: Columns, window: int | None) -> Tensor:
    """Who may look at whom, element by element; each column is (place, document, branch, position, last place).

    A token sees itself and, up to its last place, the prefix of its document (branch 0) and its own branch; nothing
    else. The last place is its own, or the end of its picture (see ``tokens_ahead``). With a window, it sees only less
    than ``window`` positions back (positions, not places: branches lie far from their prefix).
    Padding (document -1) sees itself only: a fully masked row would be NaN under softmax.
    """
    place, document, branch, position, last = query
    key_place, key_document, key_branch, key_position, _ = key
    visible = (key_document == document) & (document >= 0) & (key_place <= last)
    visible = visible & ((key_branch == 0) | (key_branch == branch))
    if window is not None:
        visible = visible & (key_position > position - window)
    return visible | (key_place == place)


def tokens_ahead(is_image: Tensor, num_image_tokens: int) -> Tensor:
    """How many tokens of its own picture follow each image token, so that a picture's tokens can see each other.

    Args:
        is_image: bool [B, T]. num_image_tokens: K, tokens of one picture, which stand side by side.

    Returns:
        int64 [B, T], K - 1 to 0 within a picture, 0 at words.

    Raises:
        ValueError: a picture is cut or interrupted.
    """
    if num_image_tokens < 1:
        raise ValueError(f"num_image_tokens is {num_image_tokens}; it must be the connector's tokens for each picture")
    place_in_picture = (is_image.cumsum(-1) - 1) % num_image_tokens
    ahead = (num_image_tokens - 1 - place_in_picture) * is_image
    if ((ahead > 0) & ~F.pad(is_image[:, 1:], (0, 1))).any():
        raise ValueError(
            f"a picture's {num_image_tokens} tokens do not stand side by side in one pass, but with "
            "image_attention=bidirectional they see each other; cut rows between pictures, or set it to causal"
        )
    return ahead


def _columns(
    documents: Tensor, branches: Tensor, position_ids: Tensor, ahead: Tensor | None, num_places: int
) -> Columns:
    """The columns that ``sees`` compares, int64 [B, num_places] each, filled up with padding."""
    length = documents.shape[1]
    gap = max(0, num_places - length)
    places = torch.arange(length + gap, device=documents.device).expand(len(documents), -1).contiguous()
    last = places if ahead is None else places + F.pad(ahead, (length - ahead.shape[1], gap))
    if not gap:
        return places, documents, branches, position_ids, last
    return places, F.pad(documents, (0, gap), value=-1), F.pad(branches, (0, gap)), F.pad(position_ids, (0, gap)), last


def structure_mask(
    documents: Tensor,
    branches: Tensor,
    position_ids: Tensor,
    window: int | None = None,
    num_queries: int | None = None,
    ahead: Tensor | None = None,
    keys: range | None = None,
) -> Tensor:
    """The mask of rows in which documents lie side by side, each a prefix with branches (see ``sees``).

    Args:
        documents: int64 [B, T], -1 on padding. branches: int64 [B, T], 0 on a prefix.
        position_ids: int64 [B, T]. window: of a sliding-attention layer.
        num_queries: Q, only the last columns ask, the others are in a cache; by default all, Q = T.
        ahead: int64 [B, Q], how far behind its own place each of them looks (see ``tokens_ahead``); by default 0.
        keys: the places that are asked, by default all T; places from T on are the empty ones of a cache.

    Returns:
        bool [B, 1, Q, len(keys)], True where a query (third axis) sees a key (last axis).
    """
    length = documents.shape[1]
    keys = range(length) if keys is None else keys
    columns = _columns(documents, branches, position_ids, ahead, keys.stop)
    first = 0 if num_queries is None else length - num_queries
    asking: Any = tuple(column[:, first:length].unsqueeze(-1) for column in columns)
    asked: Any = tuple(column[:, keys.start : keys.stop].unsqueeze(-2) for column in columns)
    return sees(asking, asked, window).unsqueeze(1)


def block_mask(
    documents: Tensor,
    branches: Tensor,
    position_ids: Tensor,
    window: int | None = None,
    num_queries: int | None = None,
    ahead: Tensor | None = None,
    keys: range | None = None,
) -> Any:
    """``structure_mask`` for FlexAttention (arXiv 2412.05496), which skips blocks of pairs that are masked whole."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = documents.shape[1]
    keys = range(length) if keys is None else keys
    columns = _columns(documents, branches, position_ids, ahead, keys.stop)
    first = 0 if num_queries is None else length - num_queries

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(
            tuple(column[row, query + first] for column in columns),  # type: ignore[arg-type]
            tuple(column[row, key + keys.start] for column in columns),  # type: ignore[arg-type]
            window,
        )

    return create_block_mask(visible, len(documents), None, length - first, len(keys), device=str(documents.device))


def kernels(config: PreTrainedConfig) -> dict[str, Any]:
    """Attention kernels of a configuration and all below it, as its ``_attn_implementation`` can be set to."""
    below = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    return {"": getattr(config, "_attn_implementation", None), **{name: kernels(part) for name, part in below.items()}}


def separable(config: PreTrainedConfig) -> bool:
    """Whether a mask can keep the texts of a row apart in every layer of a language model, also while a cache grows."""
    types = set(getattr(config, "layer_types", None) or [])
    return config._attn_implementation in MASK_KERNELS and types <= LAYER_TYPES


def check_takes_masks(config: PreTrainedConfig, who: str = "packed rows need", off: str = "data.packing=false") -> None:
    """Refuse a language model whose attention cannot follow a mask of ours in every layer.

    Args:
        config: of the language model. who, off: for the message, what needs it and how to do without.

    Raises:
        ValueError: its attention kernel takes no ready mask, or it has other layers than full and sliding attention.
    """
    if (kernel := config._attn_implementation) not in KERNELS:
        raise ValueError(
            f"{who} attention kernel {', '.join(KERNELS)}, not {kernel!r}; load the model with one of them or set {off}"
        )
    if unknown := set(getattr(config, "layer_types", None) or []) - LAYER_TYPES:
        raise ValueError(
            f"{who} full or sliding attention in all layers, but {config.model_type} has layers of type "
            f"{sorted(unknown)[0]!r}; set {off}"
        )


def attention_argument(
    config: PreTrainedConfig,
    documents: Tensor,
    branches: Tensor,
    position_ids: Tensor,
    dtype: torch.dtype,
    num_queries: int | None = None,
    ahead: Tensor | None = None,
    cache: Cache | None = None,
) -> Any:
    """What a language model of transformers takes as attention_mask for such rows: one mask, or one by layer type.

    Args:
        config: of the language model. dtype: of its activations, for kernels that add the mask.
        documents, branches, position_ids, num_queries, ahead: see ``structure_mask``.
        cache: whose layers may keep fewer or more places than the T columns; by default they keep all.

    Raises:
        ValueError: see ``check_takes_masks``.
    """
    check_takes_masks(config)
    kernel = config._attn_implementation
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or []

    def mask(window: int | None, layer: int = 0) -> Any:
        keys = None if cache is None else _kept_places(cache, num_queries or documents.shape[1], layer)
        structure = (documents, branches, position_ids, window, num_queries, ahead, keys)
        if kernel == "flex_attention":
            return block_mask(*structure)
        visible = structure_mask(*structure)
        if kernel == "sdpa":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    if not types:
        return mask(window)
    if "sliding_attention" not in types:
        return mask(None)
    by_type = {"full_attention": None, "sliding_attention": window}
    return {name: mask(reach, types.index(name)) for name, reach in by_type.items() if name in types}


def _kept_places(cache: Cache, num_queries: int, layer: int) -> range:
    """Places of the keys that a layer's cache hands over, the new ones included."""
    length, offset = cache.get_mask_sizes(num_queries, layer)
    return range(int(offset), int(offset) + int(length))
