"""Models without weights have exactly the parameters of the models that are built, for every registered part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eyespot.compose import build_from_settings
from eyespot.config import ConfigError, ModelSettings, from_dict
from eyespot.models.parameters import count_parameters
from eyespot.plan.skeleton import skeleton
from eyespot.registry import CONNECTORS, LANGUAGES, VISION

VIT = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2,
                               "num_attention_heads": 2}}  # fmt: skip
GPT = {"name": "gpt", "args": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                               "max_position_embeddings": 64}, "tokenizer": "byte"}  # fmt: skip
CONNECTOR_ARGUMENTS: dict[str, dict[str, Any]] = {
    "conv": {"conv_dim": 16, "keep": 3, "boxes": True},
    "perceiver": {"num_queries": 5, "depth": 2, "heads": 2, "head_dim": 8},
    "qformer": {"num_queries": 5, "hidden_dim": 16, "depth": 2, "heads": 2},
}
VISION_ARGUMENTS: dict[str, dict[str, Any]] = {
    "vit": VIT["args"],  # type: ignore[dict-item]
    "convnet": {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "groups": 4},
    "efficientnet_lite": {"pretrained": False, "image_size": 64},
    "fusion": {"first": {"name": "vit", **VIT["args"]}, "second": {"name": "vit", **VIT["args"]}},  # type: ignore[dict-item]
}


def check(vision: Any = VIT, connector: Any = None, language: Any = GPT, **more: Any) -> None:
    values = {"vision": vision, "connector": connector or {"name": "linear"}, "language": language, **more}
    settings = from_dict(ModelSettings, values, "model")
    model, processor = build_from_settings(settings)
    parts = skeleton(settings, fast_bfloat16=False)
    modes = {part: values[part].get("train", "frozen" if part != "connector" else "full") for part in
             ("vision", "connector", "language")}  # fmt: skip
    parts.model.set_trainable(**modes, alignment="frozen")
    assert count_parameters(parts.model) == count_parameters(model)
    assert all(parameter.is_meta for parameter in parts.model.parameters())
    assert parts.model.config.num_image_tokens == model.config.num_image_tokens
    assert parts.processor is not None and parts.processor.image_token_id == processor.image_token_id


@pytest.mark.parametrize("name", VISION.names())
def test_every_encoder(name: str, clip_folder: Path) -> None:
    arguments = {"source": str(clip_folder)} if name == "pretrained" else VISION_ARGUMENTS[name]
    check(vision={"name": name, "args": arguments, "train": "full"})


@pytest.mark.parametrize("name", CONNECTORS.names())
def test_every_connector(name: str) -> None:
    image = {**VIT["args"], "image_size": 32}  # type: ignore[dict-item]
    check({"name": "vit", "args": image}, {"name": name, "args": CONNECTOR_ARGUMENTS.get(name, {})})


@pytest.mark.parametrize("name", LANGUAGES.names())
def test_every_language_model(name: str, llama_folder: Path, gguf_file: Path) -> None:
    sources = {"pretrained": llama_folder, "gguf": gguf_file}
    language = {"name": name, "args": {"source": str(sources[name])}} if name in sources else GPT
    check(language={**language, "train": "lora", "lora": {"r": 4, "targets": "all-linear"}})


def test_layers_that_are_not_read_and_a_text_side(clip_folder: Path) -> None:
    check({"name": "pretrained", "args": {"source": str(clip_folder)}, "layer": -2, "keep_cls": True})
    qformer = {"name": "qformer", "args": CONNECTOR_ARGUMENTS["qformer"]}
    check(connector=qformer, alignment={"dim": 8, "tokenizer": "byte"})


def test_a_tokenizer_that_is_not_here() -> None:
    values = {"vision": VIT, "connector": {"name": "linear"}, "language": {**GPT, "tokenizer": "openai-community/gpt2"}}
    parts = skeleton(from_dict(ModelSettings, values, "model"), fast_bfloat16=True)
    assert parts.processor is None and parts.model.config.text_config.vocab_size == 50_257
    values["language"] = {**GPT, "tokenizer": "nobody/nothing"}
    with pytest.raises(ConfigError, match=r"nobody/nothing.*nobody knows how many words"):
        skeleton(from_dict(ModelSettings, values, "model"), fast_bfloat16=True)
