"""A folder as a run leaves it, without a training: a tiny random model, a record and an evaluation."""

from __future__ import annotations

import copy
import functools
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import eyespot
from eyespot.config import to_dict
from eyespot.data.sample import Sample
from eyespot.evaluation.results import Evaluation
from eyespot.evaluation.runner import evaluate
from eyespot.inference import Assistant
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Processor
from eyespot.training.run import compose_settings

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
COLOURS = ("red", "lime", "blue", "white", "black", "yellow", "cyan", "magenta", "gray", "orange", "navy", "pink")
STEPS = 80
ORIGIN = {
    "command": "eyespot train recipe=quickstart", "git_commit": "a" * 40, "versions": "eyespot 0.1.0, torch 2.13.0",
    "hardware": "Abacus 2000, 2 cores",
}  # fmt: skip


class Rater:
    """Right for colours with their picture, and always right, with or without, about the weather."""

    def answer_batch(self, conversations: Sequence[Any], max_new_tokens: int) -> list[str]:
        return [self._answer(images, messages) for images, messages in conversations]

    def _answer(self, images: Sequence[Any], messages: Any) -> str:
        if "weather" in str(messages):
            return "sunny"
        return next((c for c in COLOURS if images and images[0].getpixel((0, 0)) == pixel(c)), "red")


def pixel(colour: str) -> Any:
    return Image.new("RGB", (1, 1), colour).getpixel((0, 0))


def questions(truths: Sequence[str] = COLOURS) -> list[Sample]:
    """What colour each picture has, and what the weather is like."""
    return [
        Sample.question(f"{colour}-{kind}", Image.new("RGB", (16, 16), colour), text, answer, group=colour, kind=kind)
        for colour, truth in zip(COLOURS, truths, strict=True)
        for kind, text, answer in (("colour", "what colour?", truth), ("weather", "how is the weather?", "sunny"))
    ]


def rated() -> Evaluation:
    return evaluate(Rater(), questions(), name="quickstart", controls=("blind", "shuffled"), progress=False)


@functools.cache
def taught() -> tuple[VLM, Processor]:
    """A tiny model that has learned the answers of ``questions`` by heart; nobody may change it."""
    torch.manual_seed(0)
    model, processor = eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **SIZES}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 128, **SIZES},
         "tokenizer": f"char:{string.ascii_letters}{string.punctuation} \n"},
    )  # fmt: skip
    samples = questions()
    batch: dict[str, Any] = dict(processor.pad([processor.encode_conversation(s.messages) for s in samples], "right"))
    batch["pixel_values"] = processor.pixel_values([sample.images[0] for sample in samples])
    model.set_trainable(vision="full", connector="full", language="full")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2, loss.item()
    return model.eval(), processor


def tiny_model() -> Assistant:
    """A copy of ``taught``."""
    model, processor = taught()
    return Assistant(copy.deepcopy(model), processor, "cpu")


def write_run(folder: Path, recipe: str = "quickstart", evaluated: bool = True, **record: Any) -> Path:
    """The run of a recipe, as far as cards and pushing read it."""
    settings = to_dict(compose_settings([f"recipe={recipe}", *record.pop("overrides", ())]))
    eyespot.save(*taught(), folder / "model")
    training = {
        "settings": settings, "steps": 306, "samples": 7342, "seconds": 600.0, "curve": [[1, 5.0], [306, 0.25]],
        "validation": [], "warnings": [], "origin": ORIGIN, **record,
    }  # fmt: skip
    (folder / "model" / "training.json").write_text(json.dumps(training))
    (folder / "settings.json").write_text(json.dumps(settings))
    if evaluated:
        rated().write(folder)
    Image.new("RGB", (8, 8)).save(folder / "before_after.png")
    return folder
