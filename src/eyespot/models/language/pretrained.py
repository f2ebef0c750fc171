"""Any causal language model of transformers, by name or folder."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eyespot.models.loading import check_complete
from eyespot.models.nf4 import nf4_arguments


def load_language(
    source: str,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantize: Literal["nf4"] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained causal language model and its tokenizer.

    Args:
        source: name on the Hub, or folder.
        dtype: of the weights.
        attn_implementation: transformers' attention kernel; by default its own choice.
        quantize: "nf4" keeps the linear layers in four bits (see eyespot.models.nf4).

    Raises:
        ValueError: nothing can be loaded from ``source``, or some of its weights are missing.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            trust_remote_code=False,
            **(nf4_arguments(dtype) if quantize else {}),
            ignore_mismatched_sizes=True,  # check_complete refuses them, and names the first
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"language model {source!r} is neither a readable folder nor a Hub name ({first})") from error
    model, info = loaded
    model.config.__dict__.pop("quantization_config", None)  # the VLM is saved with its weights unpacked
    check_complete(model, info, source)
    return model, tokenizer
