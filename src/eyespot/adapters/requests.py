"""What a harness asks, in eyespot's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eyespot.data.sample import ContentPart, image_part, text_part
from eyespot.inference import Conversation, user_turn
from eyespot.processing.processor import IMAGE_TEXT

SAMPLING = ("top_p", "top_k")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}
READ = {"until", "max_new_tokens", "do_sample", "temperature", *SAMPLING, *NEUTRAL}


def conversation(pictures: Sequence[Any] | None, context: str) -> Conversation:
    """Pictures stand where the context says ``<image>`` if it says so once for each, else before the words."""
    images, pieces = list(pictures or []), context.split(IMAGE_TEXT)
    if len(pieces) != len(images) + 1:
        return images, user_turn(images, "".join(pieces))
    parts: list[ContentPart] = []
    for i, piece in enumerate(pieces):
        parts += [image_part()] if i else []
        parts += [text_part(piece)] if piece.strip() else []
    return images, [{"role": "user", "content": parts}]


def options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in transformers' names -> what ``Assistant.generate_text`` is told besides the limit.

    Empty if the greedy answer is wanted: if ``do_sample`` is false, or not set and no temperature above 0 is.
    """
    told = {name: settings[name] for name, neutral in NEUTRAL.items() if settings.get(name) not in (None, neutral)}
    temperature = settings.get("temperature")
    if settings.get("do_sample", temperature is not None) and temperature != 0:
        told["temperature"] = 1.0 if temperature is None else float(temperature)
        told |= {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    return told


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the ends that stands in it."""
    for end in [until] if isinstance(until, str) else until or []:
        text = text.split(end, 1)[0] if end else text
    return text
