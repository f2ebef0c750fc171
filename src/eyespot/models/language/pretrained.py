"""Any causal language model of transformers, by name or folder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eyespot.models.loading import check_complete


def load_language(
    source: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained causal language model and its tokenizer.

    Args:
        source: name on the Hub, or folder.
        dtype: of the weights.
        attn_implementation: transformers' attention kernel; by default its own choice.

    Raises:
        ValueError: nothing can be loaded from ``source``, or some of its weights are missing.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_complete refuses them, and names the first
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"language model {source!r} is neither a readable folder nor a Hub name ({first})") from error
    model, info = loaded
    check_complete(model, info, source)
    return model, tokenizer
