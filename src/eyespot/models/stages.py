"""The shapes that a batch has on its way through the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eyespot.models.loss import IGNORE_INDEX
from eyespot.models.vlm import VLM


@torch.no_grad()
def stages(model: VLM, batch: dict[str, Tensor]) -> list[tuple[str, str]]:
    """(stage, shape) of a batch on its way through the model."""
    model.eval()  # type: ignore[no-untyped-call]
    rows: list[tuple[str, str]] = []
    image_embeds = None
    if "pixel_values" in batch:
        features = model.encode_images(batch["pixel_values"])
        image_embeds = model.embed_images(image_features=features)
        rows += [("image features", shape_text(features)), ("image embeddings", shape_text(image_embeds))]
    embeds = model.embed(batch["input_ids"], image_embeds)
    output: Any = model(**batch)
    supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    vocabulary = model.config.text_config.get_text_config().vocab_size
    return [
        *rows,
        ("merged", shape_text(embeds)),
        ("logits", f"[{supervised}, {vocabulary}] at supervised tokens only"),
        ("loss", f"{float(output.loss):.4f}"),
    ]


def shape_text(tensor: Tensor) -> str:
    """Such as "[2, 16, 64] float32"."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
