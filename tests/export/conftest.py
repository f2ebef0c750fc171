"""Assistants of tiny random parts, composed like real ones, for every kind of export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, SiglipImageProcessorPil

import eyespot
from eyespot.inference import Assistant
from eyespot.processing.tokenizers import bpe_tokenizer
from tiny import IMAGE_SIZE, LANGUAGES, WIDTH, randomise, vision_encoder

TEXTS = ["What is in this picture?", "Human: What is here?", "Assistant: a red circle and two blue squares."] * 3
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
OWN_VIT = {
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
OWN_GPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
LORA = {"train": "lora", "lora": {"r": 2, "alpha": 2, "targets": "all"}}
MLP = {"name": "mlp", "args": {"hidden_dim": WIDTH}}


def save_vision(name: str, folder: Path) -> dict[str, Any]:
    """Settings of an encoder: our own ViT, or one of transformers from a folder with its image processor."""
    if name == "vit":
        return {"name": "vit", "args": OWN_VIT}
    vision_encoder(name).save_pretrained(folder)
    if name == "siglip":
        SiglipImageProcessorPil(size=SQUARE).save_pretrained(folder)
    else:
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE + 2}, crop_size=SQUARE).save_pretrained(folder)
    return {"name": "pretrained", "args": {"source": str(folder)}}


def save_language(name: str, folder: Path) -> dict[str, Any]:
    """Settings of a language model whose tokenizer joins letters, so that it matters where a prompt is cut."""
    if name == "gpt":
        return {"name": "gpt", "args": OWN_GPT}
    tokenizer = bpe_tokenizer(TEXTS, 330)
    tokenizer.save_pretrained(folder)
    config = copy.deepcopy(LANGUAGES[name]().config)
    config.vocab_size = len(tokenizer)
    for token in ("bos", "eos", "pad"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, 1)
    model.save_pretrained(folder)
    return {"name": "pretrained", "args": {"source": str(folder)}}


@pytest.fixture(scope="session")
def assistant_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Assistant]:
    """``assistant_of("clip", "llama", connector, lora=True, vision={...}, language={...}, image_mode=...)``."""

    def make(
        encoder: str, decoder: str, connector: dict[str, Any] = MLP, lora: bool = False, **settings: Any
    ) -> Assistant:
        folder = tmp_path_factory.mktemp(f"{encoder}-{decoder}")
        vision = save_vision(encoder, folder / "vision") | settings.pop("vision", {})
        language = save_language(decoder, folder / "language") | settings.pop("language", {})
        language |= LORA if lora else {}
        torch.manual_seed(5)
        model, processor = eyespot.build(vision, connector, language, **settings)
        randomise(model.connector, 3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.config.image_scale = 1.7
        return Assistant(model, processor, "cpu")

    return make
