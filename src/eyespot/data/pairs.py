"""Pictures with texts about them, as batches for losses that compare the ones with the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import torch

from eyespot.data.collate import Collator, Window
from eyespot.data.features import FeatureStore, picture_digest
from eyespot.data.sample import ImageSource, Rejected, Sample
from eyespot.processing.images import ImageError
from eyespot.processing.processor import Encoded, Processor
from eyespot.processing.prompt import PromptError


class NoPair(ValueError):
    """A sample that is not one picture with one text."""


class PairCollator(Collator):
    """Samples -> Window of one batch: a picture and a text for each row.

    The batch holds pixel_values float32 [N, 3, H, W] or image_features float [N, P, E]; text_ids and text_mask int64
    [N, T], the texts alone; image_keys and text_keys int64 [N], equal for the same picture and the same words; and with
    ``rows`` the pictures' conversations, input_ids, attention_mask and labels int64 [N, T'].

    Args:
        processor: of a model with an alignment head.
        rows: whether the language model reads the pairs; a connector with a text side needs no conversations.
        max_length: conversations are cut there.
        features: of the pictures, instead of the pictures.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        rows: bool,
        max_length: int | None = None,
        features: FeatureStore | None = None,
    ) -> None:
        super().__init__(processor, 1, max_length, None, features)
        self.rows = rows

    def __call__(self, units: Sequence[Sequence[Sample]]) -> Window:
        window = Window()
        pairs = [pair for unit in units for sample in unit if (pair := self._pair(sample, window)) is not None]
        if not pairs:
            return window
        samples, texts, pictures, conversations = zip(*pairs, strict=True)
        batch = self.processor.encode_texts(texts)
        batch["image_keys"] = torch.tensor([picture_number(sample) for sample in samples])
        batch["text_keys"] = torch.tensor([text_number(text) for text in texts])
        if self.rows:
            batch |= self.processor.pad(conversations, "right")
        window.num_tokens = int(batch["text_mask"].sum()) + len(pairs) * self.processor.num_image_tokens
        window.batches.append(self._with_images(batch, list(pictures)))
        return window

    def whole(self) -> PairCollator:
        """The same; there is only one batch in a window."""
        return self

    def _pair(self, sample: Sample, window: Window) -> tuple[Sample, str, Any, Encoded | None] | None:
        try:
            image, text = pair_of(sample)
            picture = self._open(image)
            conversation = None
            if self.rows:
                conversation = self.processor.encode_conversation(sample.messages, self.max_length)
        except (NoPair, PromptError, ImageError) as error:
            window.rejected.append(Rejected(sample.id, str(error)))
            return None
        window.ids.append(sample.id)
        return sample, text, picture, conversation


def pair_of(sample: Sample) -> tuple[ImageSource, str]:
    """The picture of a sample and what its one answer says about it.

    Raises:
        NoPair: there is not exactly one of each.
    """
    answers = [message for message in sample.messages if message["role"] == "assistant"]
    if len(sample.images) != 1 or len(answers) != 1:
        raise NoPair(
            f"not one picture and one answer but {len(sample.images)} and {len(answers)}; format captions gives "
            "such pairs"
        )
    text = "".join(part["text"] for part in answers[0]["content"] if part["type"] == "text").strip()
    if not text:
        raise NoPair("an empty text")
    return sample.images[0], text


def picture_number(sample: Sample) -> int:
    """Equal for the same picture: by the content of a file, or by the group of one that is in memory, perhaps changed
    by augmentation."""
    image = sample.images[0]
    if isinstance(image, PIL.Image.Image) and sample.group:
        return _number(sample.group.encode())
    return _number(picture_digest(image))


def text_number(text: str) -> int:
    """Equal for the same words, whatever their case and the space between them."""
    return _number(" ".join(text.split()).casefold().encode())


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def usable_samples(samples: Sequence[Sample], read: Callable[[Sample], Any]) -> tuple[list[Sample], list[str]]:
    """The samples in which ``read`` finds what it looks for, and what is wrong with the others."""
    usable, reasons = [], []
    for sample in samples:
        try:
            read(sample)
            usable.append(sample)
        except NoPair as error:
            reasons.append(f"sample {sample.id!r} has {error}")
    return usable, reasons
