"""Configurations of the pretrained parts that the recipes name, so that they are counted and shrunk without a download.

Source of each: the config.json of the model of that name on https://huggingface.co.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
)

# ViT-L: arXiv 2010.11929, table 1
LARGE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip

PUBLISHED: dict[str, Callable[[], PreTrainedConfig]] = {
    "openai/clip-vit-large-patch14": lambda: CLIPVisionConfig(**LARGE, image_size=224, patch_size=14),
    "google/vit-large-patch16-224": lambda: ViTConfig(**LARGE, image_size=224, patch_size=16),
    "google/siglip-base-patch16-224": lambda: SiglipVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
        patch_size=16,
    ),
    "google/gemma-3-270m": lambda: Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, max_position_embeddings=32_768, query_pre_attn_scalar=256,
        sliding_window=512, tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM-360M": lambda: LlamaConfig(
        vocab_size=49_152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-135M": lambda: LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=_rope(100_000.0),
        tie_word_embeddings=True,
    ),
    "meta-llama/Meta-Llama-3-8B": lambda: LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=_rope(500_000.0),
        tie_word_embeddings=False,
    ),
    "mistralai/Mistral-7B-v0.1": lambda: MistralConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32_768, rms_norm_eps=1e-5, sliding_window=4096,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def published_config(source: str) -> PreTrainedConfig:
    """The configuration of a pretrained part; of a two-tower model, that of its vision tower.

    Args:
        source: a name in PUBLISHED, a folder, or another name on the Hub.

    Raises:
        ValueError: the configuration cannot be read from there.
    """
    if source in PUBLISHED:
        return PUBLISHED[source]()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the configuration of {source!r} cannot be read ({first}); give a folder, or one of: "
            f"{', '.join(PUBLISHED)}"
        ) from error
    found: PreTrainedConfig = getattr(config, "vision_config", config)
    return found
