"""The merge: image embeddings written over the placeholder positions of the text embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def placeholder_mask(input_ids: Tensor, image_token_id: int) -> Tensor:
    """True where an image embedding belongs: input_ids int64 [B, T] -> bool [B, T]."""
    return input_ids == image_token_id


def merge(text_embeds: Tensor, image_embeds: Tensor, mask: Tensor) -> Tensor:
    """Write image embeddings over the masked positions, row by row, in order.

    Args:
        text_embeds: float [B, T, D].
        image_embeds: float [N, K, D], in the order in which the placeholders stand.
        mask: bool [B, T], True at N * K positions.

    Returns:
        float [B, T, D] in the dtype of ``text_embeds``.

    Raises:
        ValueError: the number of masked positions is not N * K.
    """
    num_placeholders = int(mask.sum())
    num_images, num_tokens = image_embeds.shape[0], image_embeds.shape[1]
    if num_placeholders != num_images * num_tokens:
        raise ValueError(
            f"input_ids hold {num_placeholders} image placeholders but {num_images} images of {num_tokens} tokens need "
            f"{num_images * num_tokens}; give one picture for each <image>, with the processor saved beside this model"
        )
    return text_embeds.masked_scatter(mask.unsqueeze(-1), image_embeds.to(text_embeds.dtype))


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that padding on either side changes nothing.

    attention_mask int64 [B, T] -> position_ids int64 [B, T]; padded positions get 0.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0).to(torch.long)


def padding_to_the_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move all padding to the left, where generation needs it; the order of the real tokens stays.

    input_ids int64 [B, T], attention_mask int64 [B, T] -> the same two, moved.
    """
    order = attention_mask.argsort(dim=-1, stable=True)
    return input_ids.gather(-1, order), attention_mask.gather(-1, order)
