"""Augmentations over the samples of one visit, which are about the same pictures and go on sharing them."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from eyespot.data.boxes import LAST, Box
from eyespot.data.sample import ContentPart, Message, Sample, text_part
from eyespot.processing.augment import Augmentation
from eyespot.processing.images import ImageError, open_image

# As `Box.to_text` writes them.
_BOX = re.compile(r"(?<![\w.,-])(?<!\d )(\d\d) (\d\d) (\d\d) (\d\d)(?! ?\d|\.\d|\w)")
# As others do: tokens, two numbers or more in brackets, or four in a row.
_COORDINATES = re.compile(
    r"<\|?/?(?:loc|box|bbox|point|quad)|\bbbox|[\[({]\s*-?[\d.]+\s*,\s*-?[\d.]|[\d.]+(?:[\s,;]+-?[\d.]+){3}",
    re.IGNORECASE,
)


class Augmenter:
    """Augmentations in order, each of which changes all samples of a visit in one and the same way, or none."""

    def __init__(self, augmentations: Sequence[Augmentation]) -> None:
        self.augmentations = list(augmentations)

    def __call__(self, samples: Sequence[Sample], rng: random.Random) -> list[Sample]:
        """The samples with opened and changed pictures, and with what is said about them.

        A picture that cannot be opened is left to whoever opens it next and can say whose it is.
        """
        changed = list(samples)
        if not changed[0].images:
            return changed
        try:
            images = [open_image(image) for image in changed[0].images]
        except ImageError:
            return changed
        for augmentation in self.augmentations:
            if reason_against(augmentation, changed) or not augmentation.chosen(rng):
                continue
            images = [augmentation.picture(image, rng) for image in images]
            changed = [_retold(sample, augmentation) for sample in changed]
        return [dataclasses.replace(sample, images=tuple(images)) for sample in changed]

    def summary(self, visits: Iterable[Sequence[Sample]]) -> list[str]:
        """One line for each augmentation: how many visits it may change, and why not the others."""
        shown = [samples for samples in visits if samples[0].images]
        lines = []
        for augmentation in self.augmentations:
            against = Counter(reason for samples in shown if (reason := reason_against(augmentation, samples)))
            reasons = ", ".join(f"{count:,} x {reason}" for reason, count in against.most_common())
            name = type(augmentation).__name__.lower()
            may = f"{name} may change {len(shown) - against.total():,} of {len(shown):,}"
            lines.append(f"{may} ({reasons})" if reasons else may)
        return lines


def reason_against(augmentation: Augmentation, samples: Sequence[Sample]) -> str:
    """Why the samples of a visit are left as they are, or ""."""
    texts = [text for sample in samples for text in _texts(sample)]
    if augmentation.moves:
        if any(_COORDINATES.search(_BOX.sub("", text)) for text in texts):
            return "has coordinates in a form that is not known"
        if augmentation.box((0, 0, 1, 1)) is None and any(_BOX.search(text) for text in texts):
            return "has boxes"
    return augmentation.reason_against(texts, len(samples[0].images))


def _texts(sample: Sample) -> list[str]:
    said = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
    return [*said, *sample.answers]


def _retold(sample: Sample, augmentation: Augmentation) -> Sample:
    """The sample as it is told of the changed picture; which caption is shown has been drawn before."""

    def told(text: str) -> str:
        return _with_boxes(augmentation.text(text), augmentation)

    def of_part(part: ContentPart) -> ContentPart:
        return text_part(told(part["text"])) if part["type"] == "text" else part

    messages: list[Message] = [
        {"role": message["role"], "content": [of_part(part) for part in message["content"]]}
        for message in sample.messages
    ]
    answers = tuple(told(answer) for answer in sample.answers)
    return dataclasses.replace(sample, messages=tuple(messages), answers=answers, captions=())


def _with_boxes(text: str, augmentation: Augmentation) -> str:
    def moved(match: re.Match[str]) -> str:
        left, top, right, bottom = (int(number) / LAST for number in match.groups())
        if not (left < right and top < bottom):
            return match.group()  # four numbers that are no box
        edges = augmentation.box((left, top, right, bottom))
        return match.group() if edges is None else Box(*edges).to_text()

    return _BOX.sub(moved, text)
