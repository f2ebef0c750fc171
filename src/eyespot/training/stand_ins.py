"""Tiny random parts and made data that stand in for those of a recipe when it is shrunk; kept in the cache folder."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from eyespot.config import ConfigError
from eyespot.files import default_cache, make_folder
from eyespot.models.published import published_config
from eyespot.processing.tokenizers import byte_tokenizer

IMAGE_SIZE, PATCH_SIZE = 32, 8
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# the Pillow processors read what the others save, and need no torchvision
IMAGE_PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip_vision_model": ("CLIPImageProcessorPil", {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": IMAGE_SIZE}),
    "siglip_vision_model": ("SiglipImageProcessorPil", {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}),
    "vit": ("ViTImageProcessorPil", {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}),
    "dinov2": ("BitImageProcessorPil", {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": IMAGE_SIZE}),
}


def tiny_vision(source: str) -> Path:
    """A folder with a random encoder of the architecture of ``source`` for 32 pixels, and its image processor.

    Raises:
        ConfigError: an architecture whose image processor is not known here.
    """
    config = published_config(source)
    if config.model_type not in IMAGE_PROCESSORS:
        raise ConfigError(
            f"vision encoder {source!r} is a {config.model_type!r}, which cannot be shrunk; choose one of: "
            f"{', '.join(IMAGE_PROCESSORS)}"
        )
    small = resized(config, {**LAYERS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE})
    name, arguments = IMAGE_PROCESSORS[config.model_type]

    def fill(folder: Path) -> None:
        model = AutoModel.from_config(small)
        spread(model)
        model.save_pretrained(folder)
        getattr(transformers, name)(**arguments).save_pretrained(folder)

    return _cached(small, fill)


def tiny_language(source: str) -> Path:
    """A folder with a random causal language model of the architecture of ``source`` and a tokenizer of bytes."""
    config, tokenizer = published_config(source), byte_tokenizer()
    share = max(1, config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads))
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    ends = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    sizes = {
        "num_key_value_heads": max(1, LAYERS["num_attention_heads"] // share), "head_dim": 8, "sliding_window": 16,
        "query_pre_attn_scalar": 8, "layer_types": (kinds * 2)[:2],
    }  # fmt: skip
    small = resized(config, {**LAYERS, **sizes, **ends, "vocab_size": len(tokenizer)})

    def fill(folder: Path) -> None:
        AutoModelForCausalLM.from_config(small).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _cached(small, fill)


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Weights so large that different pictures get different features, and norms that leave them unequally long."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.3 * noise)


def resized(config: PreTrainedConfig, sizes: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of the same class with other sizes; those that it does not have are left out."""
    values = config.to_diff_dict()
    wanted = {name: size for name, size in sizes.items() if getattr(config, name, None) is not None}
    return type(config)(**{**values, **wanted})


def _cached(config: PreTrainedConfig, fill: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest()[:12]
    folder = default_cache() / "shrunk" / f"{config.model_type}-{digest}"
    if not folder.is_dir():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make_folder(folder, fill)
    return folder


# --- data --------------------------------------------------------------------------------------------------------

COLORS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square", "triangle")
CAPTIONS = ("a {c} {s} on a {g} ground", "one {c} {s}", "a {s}, {c}, before {g}", "a {s} that is {c}", "it is a {s}")
NUM_PICTURES = 24
SPLITS = ("train", "validation", "test")


def made_data(format: str, split: str) -> dict[str, Any]:
    """Arguments of a reader for 24 drawn pictures in this format; each of SPLITS has others.

    Raises:
        ConfigError: a format that nothing is made for.
    """
    if format not in WRITERS:
        raise ConfigError(
            f"there is nothing at data.{split}, and no data is made in format {format!r}; name data that exists, or "
            f"use one of: {', '.join(WRITERS)}"
        )
    folder = default_cache() / "shrunk" / f"data-{format}-{split}-{NUM_PICTURES}"
    name, write = WRITERS[format]
    if not folder.is_dir():
        make_folder(folder, lambda partial: write(partial / name, list(_draw(partial, SPLITS.index(split)))))
    return {"format": format, "path": str(folder / name)}


Picture = tuple[str, str, str, str]  # file, color, shape, ground


def _draw(folder: Path, shift: int) -> Iterator[Picture]:
    for number in range(NUM_PICTURES):
        color, shape = COLORS[number % len(COLORS)], SHAPES[number % len(SHAPES)]
        ground = COLORS[(number + 1 + number // len(COLORS)) % len(COLORS)]
        image = Image.new("RGB", (48, 40), ground)
        draw = ImageDraw.Draw(image)
        if shape == "triangle":
            draw.polygon([(24 + shift, 6), (38 + shift, 32), (10 + shift, 32)], fill=color)
        else:
            (draw.ellipse if shape == "circle" else draw.rectangle)((12 + shift, 8, 36 + shift, 32), fill=color)
        image.save(folder / f"{number:02d}.png")
        yield f"{number:02d}.png", color, shape, ground


def _captions_of(picture: Picture) -> list[str]:
    _, color, shape, ground = picture
    return [text.format(c=color, s=shape, g=ground) for text in CAPTIONS]


def _write_captions(path: Path, pictures: list[Picture]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"caption_{i}" for i in range(len(CAPTIONS)))])
        writer.writerows([picture[0], *_captions_of(picture)] for picture in pictures)


def _write_llava(path: Path, pictures: list[Picture]) -> None:
    records = []
    for number, picture in enumerate(pictures):
        name, color, shape, _ = picture
        turns = [("What is in the picture?\n<image>", _captions_of(picture)[0]), (f"What color is the {shape}?", color)]
        turns = turns[: 2 if number % 4 == 3 else 1]  # those of one turn are pairs of a picture and a text
        said = [{"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))]
        records.append({"id": name, "image": name, "conversations": said})
    path.write_text(json.dumps(records), encoding="utf-8")


def _write_vqa(path: Path, pictures: list[Picture]) -> None:
    rows = [{"image": name, "question": f"what color is the {s}?", "answer": color} for name, color, s, _ in pictures]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


WRITERS: dict[str, tuple[str, Callable[[Path, list[Picture]], None]]] = {
    "captions": ("captions.csv", _write_captions),
    "llava": ("llava.json", _write_llava),
    "vqa": ("questions.jsonl", _write_vqa),
}
