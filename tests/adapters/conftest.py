"""A model that knows two colours, and questions about them, for both harnesses."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from PIL import Image

import eyespot
from eyespot.inference import Assistant, user_turn

COLORS = ("red", "blue")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **SIZES}, "train": "full"}
LANGUAGE = {
    "name": "gpt",
    "args": {"max_position_embeddings": 192, **SIZES},
    "tokenizer": f"char:{string.ascii_letters}{string.punctuation} \n",
    "train": "full",
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Path of a picture of each colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for color in COLORS:
        Image.new("RGB", (20, 16), color).save(folder / f"{color}.png")
    return {color: str(folder / f"{color}.png") for color in COLORS}


@pytest.fixture(scope="session")
def folder(pictures: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that answers "what color?" for both pictures, and stops."""
    torch.manual_seed(0)
    model, processor = eyespot.build(VISION, {"name": "mlp"}, LANGUAGE)
    said = [{"role": "assistant", "content": [{"type": "text", "text": color}]} for color in COLORS]
    rows = [processor.encode_conversation([*user_turn([None], "what color?"), answer]) for answer in said]
    batch = {**processor.pad(rows, "right"), "pixel_values": processor.pixel_values(list(pictures.values()))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("model")
    eyespot.save(model, processor, path)
    return path


@pytest.fixture
def assistant(folder: Path, pictures: dict[str, str]) -> Assistant:
    """The same model without a harness."""
    loaded = eyespot.load(folder, device="cpu")
    assert [loaded.ask(path, "what color?") for path in pictures.values()] == list(COLORS)
    return loaded
