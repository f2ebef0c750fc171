"""A real model whose connector says nothing is called blind, however well it scores."""

from __future__ import annotations

import dataclasses
import string
from typing import Any

import pytest
import torch
from PIL import Image

import eyespot
from eyespot.data.sample import Sample
from eyespot.evaluation.runner import evaluate
from eyespot.inference import Assistant

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **SIZES}}
LANGUAGE: dict[str, Any] = {
    "name": "gpt",
    "args": {"max_position_embeddings": 128, **SIZES},
    "tokenizer": f"char:{string.ascii_letters}{string.punctuation} \n",
}
COLOURS = ("red", "lime", "blue", "white", "black", "yellow", "cyan", "magenta")


@pytest.mark.parametrize("blinded", [False, True])
def test_only_what_pictures_change_is_sight(blinded: bool) -> None:
    torch.manual_seed(0)
    model, processor = eyespot.build(VISION, {"name": "mlp"}, LANGUAGE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.35)  # so that other pictures get other answers
        if blinded:
            for parameter in model.connector.parameters():
                parameter.zero_()
    assistant = Assistant(model, processor, "cpu")
    asked = [
        Sample.question(f"{colour}-{word}", Image.new("RGB", (16, 16), colour), word, "unknown", group=colour)
        for colour in COLOURS
        for word in ("what?", "a b c", "or")
    ]
    # whatever the model says is taken for the truth: a perfect score, seen or not
    said = assistant.answer_batch([(sample.images, sample.messages[:-1]) for sample in asked], 4)
    samples = [dataclasses.replace(s, answers=(text or "nothing",)) for s, text in zip(asked, said, strict=True)]
    result = evaluate(assistant, samples, name="own answers", max_new_tokens=4)
    assert result.accuracy == 1.0
    assert result.sees is not blinded
    assert result.verdict.startswith("does not see: +0.0 points" if blinded else "sees: ")
    assert (result.differences["shuffled"].difference == 0) is blinded
