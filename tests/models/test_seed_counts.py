"""The seed systems at full size, built without memory on the meta device: parameters, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, Gemma3TextConfig, LlamaConfig, ViTConfig, ViTModel

from eyespot.models.language.gpt import EyespotGPTConfig
from eyespot.models.parameters import count_parameters
from eyespot.models.vision.pretrained import token_counts
from eyespot.models.vision.vit import EyespotViTConfig
from eyespot.models.vlm import VLM, VLMConfig

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L14 = CLIPVisionConfig(**LARGE, image_size=224, patch_size=14)
VIT_L16 = ViTConfig(**LARGE, image_size=224, patch_size=16)
GEMMA_270M = Gemma3TextConfig(
    vocab_size=262_144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    tie_word_embeddings=True,
)
SMOLLM_360M = LlamaConfig(
    vocab_size=49_152,
    hidden_size=960,
    intermediate_size=2560,
    num_hidden_layers=32,
    num_attention_heads=15,
    num_key_value_heads=5,
    tie_word_embeddings=True,
)


def on_meta(**settings: Any) -> VLM:
    tied = settings["text_config"].tie_word_embeddings
    with torch.device("meta"):
        model = VLM(VLMConfig(tie_word_embeddings=tied, **settings))
    assert all(p.is_meta for p in model.parameters())
    return model


def counts(model: VLM) -> tuple[dict[str, int], dict[str, int]]:
    rows = count_parameters(model)
    return {row.part: row.total for row in rows}, {row.part: row.trainable for row in rows}


@pytest.mark.parametrize(
    ("targets", "adapters"),
    [("attention", 18 * 64 * (2 * (640 + 1024) + 2 * (640 + 256))), ("all", 15_187_968)],
)
def test_seed_a(targets: str, adapters: int) -> None:
    """CLIP ViT-L/14, MLP of width 2048, Gemma-3-270M with LoRA r=64.

    The source states 18,598,528 trainable parameters for adapters on all seven projections, which is true.
    """
    model = on_meta(
        vision_config=CLIP_L14,
        text_config=GEMMA_270M,
        connector={"name": "mlp", "hidden_dim": 2048, "dropout": 0.1},
        lora={"language": {"r": 64, "alpha": 128, "dropout": 0.1, "targets": targets}},
    )
    model.set_trainable(vision="frozen", connector="full", language="lora")
    total, trainable = counts(model)
    assert total == {
        "vision": 303_179_776,
        "connector": 3_410_560,
        "language": 268_098_176 + adapters,
        "model": 303_179_776 + 3_410_560 + 268_098_176 + adapters,
    }
    assert trainable == {"vision": 0, "connector": 3_410_560, "language": adapters, "model": 3_410_560 + adapters}
    if targets == "all":
        assert trainable["model"] == 18_598_528
    assert token_counts(CLIP_L14) == (1, 256)  # the source says 196 in one place; (224 / 14)^2 is 256


def test_seed_b() -> None:
    """ViT-L/16, Linear-GELU-LayerNorm-Linear, SmolLM-360M in full.

    The source's 363,729,600 trainable parameters are true. Its total of 668,080,832 counts ViT's pooler of 1,049,600
    parameters (one linear layer of 1024 x 1024), whose output is never used: without it there are 667,031,232.
    """
    model = on_meta(
        vision_config=VIT_L16,
        text_config=SMOLLM_360M,
        connector={"name": "mlp", "depth": 2, "hidden_dim": 960, "norm": True},
        keep_cls=True,
    )
    model.set_trainable(vision="frozen", connector="full", language="full")
    total, trainable = counts(model)
    assert total == {"vision": 303_301_632, "connector": 1_908_480, "language": 361_821_120, "model": 667_031_232}
    assert trainable == {"vision": 0, "connector": 1_908_480, "language": 361_821_120, "model": 363_729_600}
    with torch.device("meta"):
        with_pooler = sum(p.numel() for p in ViTModel(VIT_L16).parameters())
    assert total["model"] - total["vision"] + with_pooler == 668_080_832
    assert sum(token_counts(VIT_L16)) == 197


@pytest.mark.parametrize(
    ("tied", "connector", "expected"),
    [
        (True, {"name": "linear"}, 210_434_304),
        (True, {"name": "mlp"}, 212_205_312),
        (False, {"name": "linear"}, 249_031_680),
        (False, {"name": "mlp"}, 250_802_688),
    ],
)
def test_seed_c(tied: bool, connector: dict[str, Any], expected: int) -> None:
    """ViT-B/16 at 224 pixels, a projection, GPT of 12 layers, 768 wide, 50,257 words and 512 positions.

    The source says "about 222M" without listing parts, and the sizes that it gives do not add up to that: they make
    210 to 212 million with one matrix for embedding and head (ours by default, as GPT-2), 249 to 251 million with two.
    """
    model = on_meta(vision_config=EyespotViTConfig(), text_config=EyespotGPTConfig(tie_word_embeddings=tied),
                    connector=connector)  # fmt: skip
    total, trainable = counts(model)
    assert total["vision"] == 85_797_120
    assert total["language"] == 124_046_592 + (0 if tied else 50_257 * 768)
    assert total["model"] == trainable["model"] == expected
    assert abs(expected / 222e6 - 1) < 0.13


def test_gemma_has_as_many_parameters_as_its_file() -> None:
    """268,098,176 in the GGUF file of Gemma-3-270M; the embedding of 262,144 words is 63% of them."""
    model = on_meta(vision_config=EyespotViTConfig(), text_config=GEMMA_270M)
    assert counts(model)[0]["language"] == 268_098_176
