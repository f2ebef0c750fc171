"""Our own folder again, with the adapters added to the weights they adapt."""

from __future__ import annotations

import copy
from pathlib import Path

import PIL.Image

from eyespot.compose import save
from eyespot.export.parity import TOLERANCE, Reply, reply
from eyespot.inference import Assistant, load
from eyespot.models.vlm import VLM


class MergedConsumer:
    """What ``eyespot.load`` makes of the folder."""

    tolerance = TOLERANCE

    def __init__(self, folder: Path) -> None:
        self.assistant = load(folder, "cpu", "float32")

    def answer(self, picture: PIL.Image.Image, question: str, max_new_tokens: int) -> Reply:
        return reply(self.assistant, picture, question, max_new_tokens)


def export_merged(assistant: Assistant, folder: Path) -> MergedConsumer:
    """A folder without adapters: smaller, quicker to answer, and ready for another adapter."""
    save(without_adapters(assistant.model), assistant.processor, folder)
    return MergedConsumer(folder)


def without_adapters(model: VLM) -> VLM:
    """The model itself if it has no adapters, else a copy in which they are part of the weights."""
    if not model.config.lora:
        return model
    merged = copy.deepcopy(model)
    merged.merge_adapters()
    return merged
