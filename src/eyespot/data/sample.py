"""One training or evaluation example before any model is chosen: pictures, a conversation and reference answers."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import PIL.Image

from eyespot.pictures import LazyPicture

ImageSource = str | bytes | PIL.Image.Image | LazyPicture
"""Path of a file, bytes of a file, a picture, or one to be drawn; `eyespot.processing.images.open_image` opens all."""

_ROLES = ("system", "user", "assistant")
_SHOWN_IDS = 5


class ContentPart(TypedDict):
    """A place for the next picture, or a piece of text."""

    type: Literal["image", "text"]
    text: NotRequired[str]


class Message(TypedDict):
    """A turn of the chat format of transformers.

    Source: https://huggingface.co/docs/transformers/main/en/chat_templating_multimodal
    """

    role: Literal["system", "user", "assistant"]
    content: list[ContentPart]


def text_part(text: str) -> ContentPart:
    return {"type": "text", "text": text}


def image_part() -> ContentPart:
    return {"type": "image"}


@dataclass(frozen=True)
class Sample:
    """Pictures and a conversation; there are as many image parts as pictures, and they take them in order.

    Attributes:
        id: name of the sample in reports.
        images: the pictures, still undecoded.
        messages: the turns.
        answers: reference answers that an evaluation compares with.
        group: identity of the picture for splits and controls; samples of one group stay together. Empty: unknown.
        captions: alternatives of the last assistant text, for `visit`.
        source: name of the part of a mixture that it comes from.
        kind: of the question, for reports that tell kinds apart.
        options: the choices of a multiple-choice question.

    Raises:
        ValueError: on creation, if the parts do not fit each other.
    """

    id: str
    images: tuple[ImageSource, ...]
    messages: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    group: str = ""
    captions: tuple[str, ...] = ()
    source: str = ""
    kind: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise ValueError(f"the id of a sample is {self.id!r}; give a text that is not empty")
        for image in self.images:
            if not isinstance(image, (str, bytes, PIL.Image.Image, LazyPicture)):
                raise ValueError(  # noqa: TRY004  bad data is always a ValueError
                    f"sample {self.id!r} has a {type(image).__name__} as image; give a path, bytes or a Pillow image"
                )
        for message in self.messages:
            _check_message(self.id, message)
        _check_image_count(self.id, sum(_num_images(message) for message in self.messages), len(self.images))
        self._check_captions()

    def _check_captions(self) -> None:
        if not all(isinstance(text, str) and text for text in (*self.captions, *self.answers)):
            raise ValueError(f"sample {self.id!r} has an empty caption or answer; drop it")
        if self.captions and (not self.messages or self.messages[-1]["role"] != "assistant"):
            raise ValueError(f"sample {self.id!r} has captions but no last assistant message to hold them; add one")

    @classmethod
    def question(
        cls,
        id: str,
        image: ImageSource | tuple[ImageSource, ...],
        question: str,
        answer: str,
        answers: tuple[str, ...] | None = None,
        group: str = "",
        kind: str = "",
        options: tuple[str, ...] = (),
    ) -> Sample:
        """A question about one picture, or about several given as a tuple; `answers` is `(answer,)` unless given."""
        images = image if isinstance(image, tuple) else (image,)
        user: Message = {"role": "user", "content": [*(image_part() for _ in images), text_part(question)]}
        assistant: Message = {"role": "assistant", "content": [text_part(answer)]}
        answers = (answer,) if answers is None else answers
        return cls(id, images, (user, assistant), answers, group, kind=kind, options=options)

    @classmethod
    def caption(cls, id: str, image: ImageSource, captions: Sequence[str], prompt: str = "", group: str = "") -> Sample:
        """A picture with one or more captions, which are also the reference answers; the first one is shown.

        Raises:
            ValueError: no caption, or a text in place of a list of texts.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"sample {id!r} has captions {captions!r}; give a list with one text or more")
        asked = [image_part(), text_part(prompt)] if prompt else [image_part()]
        user: Message = {"role": "user", "content": asked}
        assistant: Message = {"role": "assistant", "content": [text_part(captions[0])]}
        return cls(id, (image,), (user, assistant), tuple(captions), group, tuple(captions))

    @property
    def texts(self) -> list[str]:
        """Everything that is said: the texts of all messages, with all captions in place of the one that is shown."""
        messages = self.messages[:-1] if self.captions else self.messages
        said = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        return [*said, *self.captions]

    def visit(self, rng: random.Random) -> Sample:
        """The sample as one epoch shows it: with one of its captions drawn at random, else unchanged."""
        if not self.captions:
            return self
        drawn: Message = {"role": "assistant", "content": [text_part(rng.choice(self.captions))]}
        return dataclasses.replace(self, messages=(*self.messages[:-1], drawn))


@dataclass(frozen=True)
class Rejected:
    """A record that is no sample; equal reasons are counted together, `detail` tells what differs."""

    id: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.id} ({self.detail})" if self.detail else self.id


@dataclass
class LoadReport:
    """What became of the records of a data set."""

    accepted: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    def summary(self) -> str:
        """One line with the totals, then one line for each reason, the most frequent first, with the first ids."""
        by_reason: dict[str, list[Rejected]] = {}
        for rejected in self.rejected:
            by_reason.setdefault(rejected.reason, []).append(rejected)
        lines = [f"{self.accepted} accepted, {len(self.rejected)} rejected"]
        for reason, group in sorted(by_reason.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(str(rejected) for rejected in group[:_SHOWN_IDS])
            more = f" and {len(group) - _SHOWN_IDS} more" if len(group) > _SHOWN_IDS else ""
            lines.append(f"  {len(group)} x {reason}: {shown}{more}")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """`data_report.txt`, the summary, and `dropped.jsonl`, id, reason and detail of every rejected record."""
        (folder / "data_report.txt").write_text(self.summary() + "\n", encoding="utf-8")
        with (folder / "dropped.jsonl").open("w", encoding="utf-8") as file:
            for rejected in self.rejected:
                record = {"id": rejected.id, "reason": rejected.reason, "detail": rejected.detail}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def blind(sample: Sample) -> Sample:
    """The sample with every image and every image part of its messages removed; the words stay as they are.

    A turn that held only images keeps one empty text part, so that the turns still alternate.
    """
    return dataclasses.replace(
        sample, images=(), messages=tuple(_without_images(message) for message in sample.messages)
    )


def _without_images(message: Mapping[str, Any]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return cast("Message", dict(message))
    parts = [part for part in content if part["type"] != "image"]
    return cast("Message", {**message, "content": parts or [text_part("")]})


def _num_images(message: Message) -> int:
    return sum(part["type"] == "image" for part in message["content"])


def _check_message(id: str, message: Message) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise ValueError(f"sample {id!r} has a message of role {role!r}; choices: {', '.join(_ROLES)}")
    if not isinstance(content, list):
        raise ValueError(  # noqa: TRY004  bad data is always a ValueError
            f"sample {id!r} has {role} content {content!r}; give a list of image and text parts"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            continue
        if kind != "image":
            raise ValueError(f"sample {id!r} has the {role} part {part!r}; give an image part or a part with text")
        if role != "user":
            raise ValueError(f"sample {id!r} has an image in a message of role {role!r}; move it to the user's turn")


def _check_image_count(id: str, num_parts: int, num_images: int) -> None:
    if num_parts == num_images:
        return
    given = "1 image was" if num_images == 1 else f"{num_images} images were"
    cure = "add the image or drop the placeholder" if num_parts > num_images else "add a placeholder or drop the image"
    raise ValueError(f"sample {id!r} has {num_parts} <image> but {given} given; {cure}")
