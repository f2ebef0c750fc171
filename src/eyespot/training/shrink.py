"""Recipes made small, for tests and a first try of a whole run: ``eyespot train recipe=NAME +shrink=true``.

What a recipe is made of stays: families of parts, what learns, losses, stages, templates, data formats. Sizes, steps
and downloads go: pretrained parts become tiny random ones of the same architecture, and data that is not on this disk a
made set in the same format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eyespot.config import ConfigError, sources_of
from eyespot.models.language.gguf import GEMMA_PACKAGE
from eyespot.training.stand_ins import SPLITS, made_data, tiny_language, tiny_vision

GEMMA = "google/gemma-3-270m"
OWN_VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "convnet": {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "groups": 4},
    "efficientnet_lite": {"pretrained": False},
}
OWN_LANGUAGE = {"gpt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}}
CONNECTORS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden_dim": 48},
    "perceiver": {"num_queries": 4, "depth": 2, "heads": 2, "head_dim": 8},
    "qformer": {"num_queries": 4, "hidden_dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "source": None},
}
STEPS = {"max_steps": 6, "batch_size": 2}
TRAINER = {
    **STEPS, "precision": "fp32", "compile": False, "num_workers": 0, "log_every": 1, "validate_every": 3,
    "validation_limit": 8, "checkpoint_every": 2, "samples_every": 3, "num_samples": 2,
}  # fmt: skip
EVALUATION = {"limit": 8, "batch_size": 8, "max_new_tokens": 8, "before": 4}


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a composed recipe, made small.

    Raises:
        ConfigError: a part or a data format that nothing can stand in for.
    """
    model = values["model"]
    small: dict[str, Any] = {
        **values,
        "name": f"{values['name']}_shrunk",
        "model": {
            **model,
            "vision": _vision(model["vision"]),
            "connector": _with_args(model["connector"], CONNECTORS.get(model["connector"]["name"], {})),
            "language": _language(model["language"]),
        },
        "data": _data(values["data"]),
        "trainer": {**values.get("trainer", {}), **TRAINER},
        "evaluation": {**values.get("evaluation", {}), **EVALUATION},
    }
    if alignment := model.get("alignment"):
        small["model"]["alignment"] = {**alignment, "dim": 16, "tokenizer": _tokenizer(alignment.get("tokenizer"))}
    if stages := values.get("stages"):
        small["stages"] = [_stage(stage) for stage in stages]
    return small


def _with_args(part: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, "args": {**(part.get("args") or {}), **sizes}}


def _vision(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["name"] == "pretrained":
        part = _with_args(part, {"source": str(tiny_vision(part["args"]["source"]))})
    else:
        part = _with_args(part, _sizes(OWN_VISION, part["name"], "vision encoder"))
    layer = part.get("layer")
    return {**part, "layer": layer if layer is None or abs(layer) <= 2 else -2, "lora": _lora(part.get("lora"))}


def _language(part: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {"lora": _lora(part.get("lora")), "quantize": None}
    arguments = part.get("args") or {}
    if part["name"] in ("pretrained", "gguf"):
        source = GEMMA if arguments.get("source", GEMMA_PACKAGE) == GEMMA_PACKAGE else arguments["source"]
        changes |= {"name": "pretrained", "args": {"source": str(tiny_language(source))}, "tokenizer": None}
        return {**part, **changes}
    part = _with_args(part, _sizes(OWN_LANGUAGE, part["name"], "language model"))
    return {**part, **changes, "tokenizer": _tokenizer(part.get("tokenizer"))}


def _sizes(known: Mapping[str, dict[str, Any]], name: str, kind: str) -> dict[str, Any]:
    if name not in known:
        raise ConfigError(f"{kind} {name!r} has no small sizes; shrinking knows: {', '.join(known)}")
    return known[name]


def _tokenizer(name: str | None) -> str | None:
    """Tokenizers that are learned or made stay so; those of a download become bytes."""
    if name is None or name == "byte" or name.startswith("char:"):
        return name
    return "bpe:280" if name.startswith("bpe:") else "byte"


def _lora(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A small rank with the same scale alpha / r."""
    if settings is None:
        return None
    rank, alpha = settings.get("r", 64), settings.get("alpha", 128)
    return {**settings, "r": min(rank, 4), "alpha": alpha * min(rank, 4) / rank}


def _data(settings: Mapping[str, Any]) -> dict[str, Any]:
    small = {**settings, "limit": 32}
    for split in SPLITS:
        if settings.get(split) is not None:
            small[split] = _sources(settings[split], split)
    if settings.get("validation") is None and "validation_share" in settings:
        small["validation_share"] = 0.2
    return small


def _sources(source: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A source as it is if its path exists or it needs none, else made data in its format."""
    if "" not in (parts := sources_of(source)):
        return {name: _sources(part, split) for name, part in parts.items()}
    if "path" not in source or Path(source["path"]).exists():
        return dict(source)
    kept = {key: value for key, value in source.items() if key in ("prompt", "weight", "limit")}
    return {**kept, **made_data(source["format"], split)}


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    small = {**stage, "data": _data(stage.get("data") or {}), "trainer": {**(stage.get("trainer") or {}), **STEPS}}
    del small["data"]["limit"]
    return small
