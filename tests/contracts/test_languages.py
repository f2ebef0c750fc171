"""Every registered language model keeps the contract: a causal language model of transformers, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from eyespot.compose import build, load_parts, save
from eyespot.config import LanguageSettings
from eyespot.models.language.gguf import load_gguf
from eyespot.models.loss import causal_loss, head_logits
from eyespot.registry import LANGUAGES
from tiny import close, write_gguf

# settings of each language model, small; folders and files come from fixtures
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "pretrained": [{}],
    "gguf": [{}],
    "gpt": [
        {"args": {"max_position_embeddings": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}},
        {"args": {"max_position_embeddings": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "tie_word_embeddings": False}, "tokenizer": "char:abcdefghijklmnopqrstuvwxyz ?:\nHA"},
    ],
}  # fmt: skip
CASES = [pytest.param((name, i), id=f"{name}-{i}") for name in LANGUAGES for i in range(len(SETTINGS.get(name, [])))]
VIT = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1,
                               "num_attention_heads": 2}}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def settings(request: pytest.FixtureRequest, llama_folder: Path) -> dict[str, Any]:
    name, i = request.param
    chosen = {"name": name, **SETTINGS[name][i]}
    if name == "pretrained":
        chosen["args"] = {"source": str(llama_folder)}
    if name == "gguf":
        file: Path = request.getfixturevalue("gguf_file")
        chosen["args"] = {"source": str(file), "cache_dir": str(file.parent / "cache")}
    return chosen


@pytest.fixture(scope="module")
def parts(settings: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    torch.manual_seed(0)
    model, processor = build(VIT, {"name": "linear"}, {**settings, "train": "full"})
    return model.language.eval(), processor.tokenizer


def ids(model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, min(vocabulary, 30), (2, 9), generator=torch.Generator().manual_seed(1))


def test_every_language_model_is_tested() -> None:
    missing = [name for name in LANGUAGES if name not in SETTINGS]
    assert not missing, f"add tiny settings of {missing} to SETTINGS in this file, so that the contract is tested"


@torch.no_grad()
def test_shapes_and_our_logits(parts: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = parts
    own = model(input_ids=ids(model)).logits
    hidden = model.base_model(input_ids=ids(model)).last_hidden_state
    assert own.shape == (2, 9, model.config.vocab_size) and hidden.shape == (2, 9, model.config.hidden_size)
    assert len(tokenizer) <= model.config.vocab_size
    close(head_logits(model, hidden), own)
    assert isinstance(model, GenerationMixin)


@torch.no_grad()
def test_embeddings_in_place_of_ids(parts: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, _ = parts
    embeds = model.get_input_embeddings()(ids(model))
    close(model.base_model(inputs_embeds=embeds).last_hidden_state, model.base_model(ids(model)).last_hidden_state)


def test_gradients_reach_embeddings_and_parameters(parts: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, _ = parts
    model.zero_grad()
    embeds = model.get_input_embeddings()(ids(model)).detach().requires_grad_()
    causal_loss(model, model.base_model(inputs_embeds=embeds).last_hidden_state, ids(model)).backward()
    assert embeds.grad is not None and (embeds.grad[:, :-1].abs().sum(-1) > 0).all()
    head = model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        is_used = parameter is head or "embed_tokens" not in name  # tokens came as embeddings
        assert not is_used or (parameter.grad is not None and parameter.grad.isfinite().all()), name
    model.zero_grad()


@torch.no_grad()
def test_bfloat16_build(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, _ = build(VIT, {"name": "linear"}, {**settings, "dtype": "bfloat16"})
    assert {p.dtype for p in model.language.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    hidden = model.language.eval().base_model(input_ids=ids(model.language)).last_hidden_state
    assert hidden.dtype == torch.bfloat16 and hidden.isfinite().all()


def test_training_mode_and_back(parts: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, _ = parts
    before = model(input_ids=ids(model)).logits
    model.train()
    model(input_ids=ids(model), labels=ids(model)).loss.backward()
    model.zero_grad()
    model.eval()
    assert torch.equal(model(input_ids=ids(model)).logits, before)


@torch.no_grad()
def test_saved_alone_and_inside_a_vlm(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = build(VIT, {"name": "linear"}, {**settings, "train": "full"})
    model.eval()
    model.language.save_pretrained(tmp_path / "language")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    expected = model.language(input_ids=ids(model.language)).logits
    assert torch.equal(alone(input_ids=ids(alone)).logits, expected)
    save(model, processor, tmp_path / "vlm")
    loaded, loaded_processor = load_parts(tmp_path / "vlm")
    assert torch.equal(loaded.language(input_ids=ids(loaded.language)).logits, expected)
    assert loaded_processor.tokenizer("a?").input_ids == processor.tokenizer("a?").input_ids


def test_tokens_come_back_as_text(parts: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    _, tokenizer = parts
    row = tokenizer("how?", add_special_tokens=False).input_ids
    assert tokenizer.decode(row) == "how?"


def test_nothing_readable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"language model .* is neither a readable folder nor a Hub name"):
        LANGUAGES["pretrained"](str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        LANGUAGES["gguf"](str(tmp_path / "a.gguf"))
    with pytest.raises(ValueError, match="does not exist"):
        LANGUAGES["gguf"](str(tmp_path / "b.gguf"))
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple"):
        LANGUAGES["gpt"](hidden_size=30, num_attention_heads=4)


def test_gguf_is_unpacked_once_and_exactly(tmp_path: Path) -> None:
    """In memory what the file holds, but for the rounding of the unpacked copy to bfloat16."""
    written = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_gguf(str(tmp_path / "tiny.gguf"), torch.float32, str(tmp_path / "cache"))
    state = written.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(torch.bfloat16).float()), name
    assert tokenizer("he", add_special_tokens=False).input_ids == [256]
    (folder,) = (tmp_path / "cache").iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    again, _ = load_gguf(str(tmp_path / "tiny.gguf"), torch.bfloat16, str(tmp_path / "cache"))
    assert again.dtype == torch.bfloat16
    assert [*(tmp_path / "cache").iterdir()] == [folder]  # nothing half-written is left
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    files = {file.suffix for file in folder.iterdir()}
    assert ".safetensors" in files and ".bin" not in files


def test_settings_know_every_argument() -> None:
    """What the table uses are settings that a recipe could use, too."""
    for entries in SETTINGS.values():
        for entry in entries:
            LanguageSettings(name="gpt", **entry)
