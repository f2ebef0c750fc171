"""A nanoVLM of its own layout, computed here from its definition, and the same folder imported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import eyespot
from eyespot.cli import main
from eyespot.importing.nanovlm import import_nanovlm
from eyespot.inference import user_turn
from eyespot.processing.tokenizers import byte_tokenizer
from tiny import close, randomise

CONFIG: dict[str, Any] = {
    "vit_hidden_dim": 24, "vit_inter_dim": 40, "vit_patch_size": 4, "vit_img_size": 16, "vit_n_heads": 2,
    "vit_dropout": 0.0, "vit_n_blocks": 2, "vit_ln_eps": 1e-6, "vit_cls_flag": False, "vit_model_type": "siglip",
    "lm_hidden_dim": 32, "lm_inter_dim": 48, "lm_rms_eps": 1e-5, "lm_re_base": 100, "lm_max_position_embeddings": 256,
    "lm_vocab_size": 260, "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_dropout": 0.0, "lm_n_blocks": 2,
    "lm_attn_scaling": 1.0, "lm_max_length": 79, "lm_use_tokens": False, "lm_tie_weights": True,
    "lm_model_type": "llama", "mp_pixel_shuffle_factor": 2, "vlm_load_backbone_weights": True,
}  # fmt: skip
QUESTION = "What is it?"


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """float [B, heads, T, H] each -> [B, T, heads * H]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def turned(x: Tensor, base: float) -> Tensor:
    """Rotary positions: the halves of every head as pairs."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * base ** (-torch.arange(half) / half)
    first, second = x.split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class VisionBlock(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, inner = c["vit_hidden_dim"], c["vit_inter_dim"]
        self.heads = c["vit_n_heads"]
        self.ln1, self.ln2 = nn.LayerNorm(width, c["vit_ln_eps"]), nn.LayerNorm(width, c["vit_ln_eps"])
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv_proj, self.attn.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part, self.heads) for part in self.attn.qkv_proj(self.ln1(x)).chunk(3, -1))
        x = x + self.attn.out_proj(attend(q, k, v, causal=False))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.ln2(x)), approximate="tanh"))


class VisionEncoder(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, size = c["vit_hidden_dim"], c["vit_patch_size"]
        self.patch_embedding = nn.Module()
        self.patch_embedding.conv = nn.Conv2d(3, width, size, stride=size)
        self.patch_embedding.position_embedding = nn.Parameter(torch.rand(1, (c["vit_img_size"] // size) ** 2, width))
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c["vit_n_blocks"]))
        self.layer_norm = nn.LayerNorm(width, c["vit_ln_eps"])

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding.conv(pixels).flatten(2).transpose(1, 2) + self.patch_embedding.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.layer_norm(x)  # type: ignore[no-any-return]


class Norm(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c["lm_hidden_dim"])), c["lm_rms_eps"]

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class TextBlock(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, inner, self.c = c["lm_hidden_dim"], c["lm_inter_dim"], c
        narrow = width // c["lm_n_heads"] * c["lm_n_kv_heads"]
        self.norm1, self.norm2, self.attn, self.mlp = Norm(c), Norm(c), nn.Module(), nn.Module()
        self.attn.q_proj, self.attn.out_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.attn.k_proj, self.attn.v_proj = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.mlp.gate_proj, self.mlp.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.mlp.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        base, number, groups = self.c["lm_re_base"], self.c["lm_n_heads"], self.c["lm_n_kv_heads"]
        y = self.norm1(x)
        q = turned(heads(self.attn.q_proj(y), number), base)
        k, v = turned(heads(self.attn.k_proj(y), groups), base), heads(self.attn.v_proj(y), groups)
        k, v = (part.repeat_interleave(number // groups, 1) for part in (k, v))
        x = x + self.attn.out_proj(attend(q, k, v, causal=True))
        y = self.norm2(x)
        return x + self.mlp.down_proj(nn.functional.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


class NanoVLM(nn.Module):
    """Names and arithmetic of nanoVLM 0.1; written from its description, not from its code."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.vision_encoder = VisionEncoder(c)
        self.MP, self.decoder, self.factor = nn.Module(), nn.Module(), c["mp_pixel_shuffle_factor"]
        self.MP.proj = nn.Linear(c["vit_hidden_dim"] * self.factor**2, c["lm_hidden_dim"], bias=False)
        self.decoder.token_embedding = nn.Embedding(c["lm_vocab_size"], c["lm_hidden_dim"])
        self.decoder.blocks = nn.ModuleList(TextBlock(c) for _ in range(c["lm_n_blocks"]))
        self.decoder.norm = Norm(c)
        self.decoder.head = nn.Linear(c["lm_hidden_dim"], c["lm_vocab_size"], bias=False)
        if c["lm_tie_weights"]:
            self.decoder.head.weight = self.decoder.token_embedding.weight

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        patches = self.vision_encoder(pixels)
        side, f = math.isqrt(patches.shape[1]), self.factor
        squares = patches.unflatten(1, (side, side)).unfold(1, f, f).unfold(2, f, f)
        joined = squares.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)  # [N, K, f * f * E]
        x = torch.cat([self.MP.proj(joined), self.decoder.token_embedding(ids)], dim=1)
        for block in self.decoder.blocks:
            x = block(x)
        return self.decoder.head(self.decoder.norm(x))  # type: ignore[no-any-return]


def write(folder: Path, skip: str = "", **changes: Any) -> NanoVLM:
    """A random nanoVLM as it saves itself: of tied weights one, and the frequencies of the rotary positions."""
    folder.mkdir(exist_ok=True)
    config = {**CONFIG, "lm_tokenizer": str(folder / "tokenizer"), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    model = NanoVLM({**CONFIG, **changes}).eval()
    randomise(model, 3)
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name != skip}
    save_file({**tensors, "decoder.rotary_embd.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    return model


def picture() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8))


@torch.no_grad()
@pytest.mark.parametrize(
    ("tied", "skip"),
    [(True, "decoder.token_embedding.weight"), (True, "decoder.head.weight"), (True, ""), (False, "")],
    ids=["tied, the head is saved", "tied, the embedding is saved", "tied, both are saved", "untied"],
)
def test_logits_pixels_and_words(tmp_path: Path, tied: bool, skip: str) -> None:
    source = write(tmp_path / "nano", skip, lm_tie_weights=tied)
    assert main(["import", "nanovlm", str(tmp_path / "nano"), "--out", str(tmp_path / "ours")]) == 0
    assistant = eyespot.load(tmp_path / "ours", "cpu", "float32")
    ours = assistant.processor.prompt_batch([([picture()], user_turn([picture()], QUESTION))])

    scaled = np.asarray(picture().resize((16, 16), PIL.Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(scaled.astype(np.float32) / 255).permute(2, 0, 1)[None]
    close(ours["pixel_values"], pixels, 1e-6)
    ids = [byte + 4 for byte in f"Question: {QUESTION} Answer:".encode()]
    assert ours["input_ids"].tolist() == [[260] * 4 + ids]

    wanted = source(pixels, torch.tensor([ids]))
    close(assistant.model(**ours).logits[..., :260], wanted, 3e-5)  # AMD's kernels sum in another order than Intel's
    assert wanted.std() > 0.1

    said: list[int] = []
    for _ in range(6):
        said.append(int(source(pixels, torch.tensor([ids + said]))[0, -1].argmax()))
    answer = assistant.ask(picture(), QUESTION, max_new_tokens=6)
    assert answer == assistant.processor.decode_answer(said)


def test_training_goes_on_where_the_question_ends(tmp_path: Path) -> None:
    write(tmp_path)
    processor = import_nanovlm(str(tmp_path)).processor
    turns = [*user_turn([picture()], QUESTION), {"role": "assistant", "content": "a cat"}]
    row = processor.encode_conversation(turns)
    learned = [label for label in row.labels if label != -100]
    assert processor.tokenizer.decode(learned) == "a cat<eos>"
    text = processor.tokenizer.decode(row.input_ids[4:])
    assert text == f"Question: {QUESTION} Answer:a cat<eos>"


def test_another_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, lm_tokenizer="nobody/nothing")
    with pytest.raises(ValueError, match=r"no tokenizer in 'nobody/nothing' .* with --tokenizer"):
        import_nanovlm(str(tmp_path))
    assert import_nanovlm(str(tmp_path), tokenizer=str(tmp_path / "tokenizer")).processor.tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vlm_extra_tokens": {"image_token": "<|image|>"}}, "later than 0.1 .*'vlm_extra_tokens'.* one square"),
        ({"vit_cls_flag": True}, "has vit_cls_flag True; only False can be imported"),
        ({"lm_attn_scaling": 0.5}, "has lm_attn_scaling 0.5"),
        ({"vit_n_blocks": 1}, "tensors without a place, first 'vision_encoder.blocks.1"),
        ({"vit_n_blocks": 3}, "tensors missing, first 'vision.encoder.layers.2"),
        ({"lm_inter_dim": 50}, "tensors of another shape, first 'language.model.layers.0.mlp"),
        ({"mp_pixel_shuffle_factor": 3}, "of another shape, first 'connector.proj.weight'"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        import_nanovlm(str(tmp_path))


def test_other_models_and_different_tied_weights(tmp_path: Path) -> None:
    write(tmp_path, lm_tie_weights=False)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lm_tie_weights": True}))
    with pytest.raises(ValueError, match=r"ties its head to its embedding .* but holds two different ones"):
        import_nanovlm(str(tmp_path))
    file.write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match=r"is no nanoVLM: its config.json \(llava\) lacks 'vit_hidden_dim'"):
        import_nanovlm(str(tmp_path))
