"""Tokenizers of texts that stand alone, beside a picture and not in a conversation: as BERT wants them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TEXT_FOLDER = "text_tokenizer"
FIRST = "<cls>"


def with_ends(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a first and a last token for every text; BERT's has them, ours gets a first one.

    Raises:
        ValueError: it has no token that could end a text.
    """
    if tokenizer.cls_token_id is None:
        tokenizer.add_special_tokens({"cls_token": FIRST})
    if tokenizer.sep_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("the text tokenizer has neither a SEP nor an EOS token; use another one, or bpe:SIZE")
    return tokenizer


def decode_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands first when a text is to be written, not read: one that no text holds.

    BLIP-2 (arXiv 2301.12597, section 3.1) adds [DEC]; a BERT that must keep its vocabulary has [MASK] to spare.
    """
    ids = (tokenizer.bos_token_id, tokenizer.mask_token_id, tokenizer.cls_token_id)
    return int(next(i for i in ids if i is not None))


def encode_alone(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[list[int], list[list[int]], int]:
    """First token, the words of each text, last token. A special token that a person typed stays a text."""
    last = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids
    return [int(tokenizer.cls_token_id)], rows, int(last)


def framed(
    first: Sequence[int], rows: Sequence[Sequence[int]], last: int, max_text: int, pad: int
) -> dict[str, Tensor]:
    """Every row between its ends, words cut so that they fit: text_ids and text_mask int64 [N, T], padded on the right.

    Args:
        first: none or one token. max_text: the most tokens of a row, ends included. pad: what fills a row.
    """
    whole = [[*first, *row[: max_text - len(first) - 1], last] for row in rows]
    width = max(map(len, whole))
    return {
        "text_ids": torch.tensor([row + [pad] * (width - len(row)) for row in whole]),
        "text_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole]),
    }
