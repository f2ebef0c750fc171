"""Tiny random parts, rows and tokenizers that many tests share. Everything here is float32 and takes milliseconds.

Shape letters are those of eyespot.models.vlm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    CohereForCausalLM,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from eyespot.models.language.gpt import build_gpt
from eyespot.models.loss import IGNORE_INDEX
from eyespot.models.vision.pretrained import without_pooler
from eyespot.models.vision.vit import build_vit
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.tokenizers import byte_tokenizer

VOCAB = 64
WIDTH = 32
IMAGE_SIZE = 16
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
# Random models have no meaningful end-of-text: without these ids generation runs to max_new_tokens.
NO_SPECIALS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **NO_SPECIALS,
}
SLIDING = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
PICTURE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough that outputs differ clearly, biases and norms that are not their neutral values.

    Embeddings are smaller than the other matrices, or a tied head would always repeat the last token.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter + 0.1 * noise)
            else:
                parameter.copy_((0.1 if id(parameter) in embeddings else 0.35) * noise)


LANGUAGES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt": lambda: build_gpt(
        vocab_size=VOCAB,
        max_position_embeddings=128,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**TEXT, **SLIDING, layer_types=["sliding_attention", "full_attention"])
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **TEXT,
            **SLIDING,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=2.0,
            attn_logit_softcapping=5.0,
            tie_word_embeddings=False,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=128, n_embd=WIDTH, n_layer=2, n_head=4, **NO_SPECIALS)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**TEXT, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(
            **TEXT, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2
        )
    ),
}
ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: build_vit(**{**PICTURE, "num_hidden_layers": 2}),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**PICTURE)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**PICTURE)),
    "hf_vit": lambda: ViTModel(ViTConfig(**PICTURE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**{**PICTURE, "mlp_ratio": 2})),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**PICTURE, mlp_ratio=2, num_register_tokens=2)
    ),
}
# tokens before the patches: CLS, and the registers
NUM_PREFIX = {"vit": 0, "clip": 1, "siglip": 0, "hf_vit": 1, "dinov2": 1, "dinov2_registers": 3}


def language_model(name: str, seed: int = 1) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = LANGUAGES[name]()
    randomise(model, seed)
    return model.eval()


def vision_encoder(name: str, seed: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = ENCODERS[name]()
    randomise(model, seed)
    return without_pooler(model).eval()


def make_vlm(language: str = "llama", vision: str = "vit", **settings: Any) -> VLM:
    """A VLM of tiny random parts in evaluation mode; by default the placeholder id lies beyond the vocabulary."""
    encoder, decoder = vision_encoder(vision), language_model(language)
    config = VLMConfig(
        vision_config=encoder.config,
        text_config=decoder.config,
        tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
        **{
            "connector": {"name": "mlp"},
            "image_token_id": VOCAB,
            "num_prefix_tokens": NUM_PREFIX[vision],
            "num_image_tokens": NUM_PATCHES,
            **settings,
        },
    )
    model = VLM(config, vision=encoder, language=decoder)
    randomise(model.connector, 3)
    return model.eval()


def save_language(name: str, folder: Path) -> Path:
    """A language model for the 260 tokens of the byte tokenizer, beside that tokenizer, as a transformers folder."""
    torch.manual_seed(1)
    config = copy.deepcopy(LANGUAGES[name]().config)
    tokenizer = byte_tokenizer()
    config.vocab_size = len(tokenizer)
    for token in ("bos", "eos", "pad"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Row:
    """ids of one row, pixels float [n, 3, H, W] of its pictures."""

    ids: list[int]
    pixels: Tensor


def make_row(layout: str, seed: int) -> Row:
    """A row from a layout such as "ttitt": t is a random token, i is a picture with its run of placeholders."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for letter in layout:
        token = int(torch.randint(1, VOCAB - 4, (1,), generator=generator))
        ids += [VOCAB] * NUM_PATCHES if letter == "i" else [token]
    return Row(ids, torch.randn(layout.count("i"), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))


def make_rows() -> list[Row]:
    """Unequal lengths; one picture, none, and two with words between them."""
    return [make_row("ttittt", 1), make_row("ttttt", 2), make_row("titttit", 3)]


def collate(rows: Sequence[Row], side: str = "right", pad_id: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask int64 [B, T], padded on one side, and pixel_values [N, 3, H, W] if there are any."""
    length = max(len(row.ids) for row in rows)
    ids, masks = [], []
    for row in rows:
        gap, real = [pad_id] * (length - len(row.ids)), [1] * len(row.ids)
        nothing = [0] * len(gap)
        ids.append(gap + row.ids if side == "left" else row.ids + gap)
        masks.append(nothing + real if side == "left" else real + nothing)
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
    pixels = torch.cat([row.pixels for row in rows])
    return {**batch, "pixel_values": pixels} if len(pixels) else batch


LAYOUTS = ("ttitttttttt", "ttt", "titttit", "tttttttt")
NUM_LABELLED = (8, 1, 2, 5)  # last tokens of each row; very unequal


def training_batch(indices: Sequence[int] = (0, 1, 2, 3), side: str = "right") -> dict[str, Any]:
    """Some of four rows with labels, as the model's forward takes them."""
    rows = [make_row(LAYOUTS[i], i) for i in indices]
    batch = collate(rows, side)
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    for place, i in enumerate(indices):
        real = batch["attention_mask"][place].nonzero().flatten()[-NUM_LABELLED[i] :]
        labels[place, real] = batch["input_ids"][place, real].clamp(max=60)
    return {**batch, "labels": labels}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def write_gguf(path: Path) -> PreTrainedModel:
    """A tiny Qwen2 with a byte-level tokenizer as an unquantised GGUF file; returns the model that was written."""
    gguf = pytest.importorskip("gguf")
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ends = {"bos_token_id": None, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 3}
    config = Qwen2Config(**{**TEXT, "vocab_size": len(words), **ends})
    model = Qwen2ForCausalLM(config)
    randomise(model, 1)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 3) + [3] * 3)  # 3: control tokens
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(ends["eos_token_id"])
    writer.add_pad_token_id(ends["pad_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()
