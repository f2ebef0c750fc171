"""Pictures and words to tensors, and back: the one path of training, evaluation and serving."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from eyespot.processing.images import open_image
from eyespot.processing.prompt import (
    TEMPLATES,
    Message,
    PromptError,
    Span,
    count_images,
    prompt_spans,
    training_spans,
)

IGNORE_INDEX = -100
IMAGE_TEXT = "<image>"
REMEMBERED_ROWS = 10_000


@dataclass(frozen=True)
class Encoded:
    """One row before padding: ids and labels of equal length, and the number of pictures in it."""

    input_ids: list[int]
    labels: list[int]
    num_images: int

    @property
    def num_supervised(self) -> int:
        """Tokens to learn; the first one of a row has nothing before it that could predict it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class Processor(ProcessorMixin):
    """An image processor, a tokenizer and a chat template.

    Args:
        image_processor: the vision encoder's own.
        tokenizer: the language model's own.
        chat_template: Jinja template.
        image_token_id: placeholder id that the model expects.
        num_image_tokens: placeholders for each picture.
        image_mode: "placeholder" puts a picture where it stands in the conversation, "prefix" puts all pictures first.
        add_bos: start every row with exactly one BOS token.
        template_kwargs: further variables for the template.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        image_token_id: int = 0,
        num_image_tokens: int = 1,
        image_mode: Literal["placeholder", "prefix"] = "placeholder",
        add_bos: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if image_mode not in ("placeholder", "prefix"):
            raise ValueError(f"image_mode is {image_mode!r}; choose placeholder or prefix")
        if add_bos and getattr(tokenizer, "bos_token_id", None) is None:
            raise ValueError("add_bos is set but the tokenizer has no BOS token; unset it")
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.image_mode = image_mode
        self.add_bos = add_bos
        self.template_kwargs = template_kwargs or {}
        self._encoded: dict[Hashable, Encoded] = {}
        super().__init__(  # type: ignore[no-untyped-call]
            image_processor, tokenizer, chat_template=chat_template or TEMPLATES["plain"]
        )

    # --- words -------------------------------------------------------------------------------------------------

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends the assistant's turn: what the template writes right after an answer."""
        probe = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        return self._end_of_turn(_after_answer(self._spans(probe, training=True)))

    def encode_conversation(self, messages: Sequence[Message], max_length: int | None = None) -> Encoded:
        """A training row: the assistant's words and the end-of-turn token are labelled, everything else is not.

        Data sets ask the same questions about many pictures, in every epoch again, so rows are remembered.

        Raises:
            PromptError: nothing to learn is left, the cut at ``max_length`` would go through a picture, or a picture
                stands after the last answer.
        """
        layout = (self.image_token_id, self.num_image_tokens, self.image_mode, self.add_bos)
        key = (repr(messages), max_length, self.chat_template, repr(self.template_kwargs), layout)
        if (known := self._encoded.get(key)) is not None:
            return known
        if len(self._encoded) >= REMEMBERED_ROWS:
            self._encoded.clear()
        encoded = self._encoded[key] = self._encode_conversation(messages, max_length)
        return encoded

    def _encode_conversation(self, messages: Sequence[Message], max_length: int | None) -> Encoded:
        spans = self._spans(messages, training=True)
        if spans[-1].learned:
            self._end_of_turn(_after_answer(spans))  # refuses a template that ends with the answer
        encoded = self._encode(spans)
        last = max(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
        if self.image_token_id in encoded.input_ids[last + 1 :]:
            raise PromptError("a picture stands after the last answer, where nothing learns from it; drop that turn")
        ids, labels = encoded.input_ids[: last + 1], encoded.labels[: last + 1]
        if max_length is not None and len(ids) > max_length:
            if self.image_token_id in ids[max_length:]:
                raise PromptError(
                    f"{len(ids)} tokens with a picture beyond max_length={max_length}; raise max_length or use a "
                    "connector with fewer tokens"
                )
            ids, labels = ids[:max_length], labels[:max_length]
            if all(label == IGNORE_INDEX for label in labels[1:]):
                raise PromptError(f"the answer starts beyond max_length={max_length}; raise max_length")
        return Encoded(ids, labels, encoded.num_images)

    def encode_prompt(self, messages: Sequence[Message]) -> Encoded:
        """The row that asks for the next assistant turn: token for token what training put before an answer."""
        return self._encode(self._spans(messages, training=False))

    def _spans(self, messages: Sequence[Message], *, training: bool) -> list[Span]:
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        specials = {name: token for name in names if (token := getattr(self.tokenizer, name)) is not None}
        make = training_spans if training else prompt_spans
        spans = make(messages, cast(str, self.chat_template), {**specials, **self.template_kwargs})
        if self.image_mode == "prefix":
            spans = sorted(spans, key=lambda span: span.kind != "image")
        return spans

    def _encode(self, spans: list[Span]) -> Encoded:
        ids: list[int] = [self.tokenizer.bos_token_id] if self.add_bos else []
        labels = [IGNORE_INDEX] * len(ids)
        first_words = next((span for span in spans if span.kind != "image"), None)
        for span in spans:
            new = self._span_ids(span)
            if self.add_bos and span is first_words and new[:1] == ids[:1]:
                new = new[1:]  # the template writes BOS itself
            known = [IGNORE_INDEX] * len(new)
            if span.learned:
                known = list(new)
            elif span.ends_turn:
                known[0] = self._end_of_turn(span)
            ids += new
            labels += known
        return Encoded(ids, labels, sum(span.kind == "image" for span in spans))

    def _span_ids(self, span: Span) -> list[int]:
        if span.kind == "image":
            return [self.image_token_id] * self.num_image_tokens
        if span.kind == "template":
            return list(self.tokenizer(span.text, add_special_tokens=False).input_ids)
        # what a person wrote never turns into a token of the template, special or not
        cuts = [match.start() + 1 for match in self._template_tokens.finditer(span.text)]
        pieces = [span.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(span.text)], strict=True)]
        rows = self.tokenizer(pieces, add_special_tokens=False, split_special_tokens=True).input_ids
        return [token for row in rows for token in row]

    @cached_property
    def _template_tokens(self) -> re.Pattern[str]:
        """Where a typed text would match an added token that the template uses but that is not marked as special."""
        probe = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        written = str(self.chat_template) + "".join(span.text for span in self._spans(probe, training=True))
        found = [
            re.escape(token.content)
            for token in self.tokenizer.added_tokens_decoder.values()
            if not token.special and len(token.content.strip()) > 1 and token.content in written
        ]
        return re.compile(f"(?=(?:{'|'.join(found)}))" if found else "(?!)")

    @cached_property
    def _turn_ends(self) -> frozenset[int]:
        """Ids that may end a turn: tokens of their own, not mere white space."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(i for i, token in added if token.special or token.content.strip()) | frozenset(
            self.tokenizer.all_special_ids
        )

    def _end_of_turn(self, span: Span) -> int:
        ids = self._span_ids(span)
        if not ids or ids[0] not in self._turn_ends:
            raise PromptError(
                f"the chat template writes {span.text!r} after an answer, which does not start with a special token, "
                "so a model could not learn to stop; use template='plain'"
            )
        return ids[0]

    @property
    def pad_token_id(self) -> int:
        """What fills a row; it is masked by place, so a tokenizer without a padding token may use any id."""
        return self.tokenizer.pad_token_id or 0

    # --- pictures ----------------------------------------------------------------------------------------------

    def pixel_values(self, images: Sequence[Any]) -> Tensor:
        """Pictures (paths, bytes or PIL) -> float32 [N, 3, H, W], by the encoder's own image processor."""
        opened = [open_image(image) for image in images]
        pixels: Tensor = self.image_processor(images=opened, return_tensors="pt")["pixel_values"]
        return pixels

    # --- batches -----------------------------------------------------------------------------------------------

    def pad(self, rows: Sequence[Encoded], side: Literal["left", "right"]) -> dict[str, Tensor]:
        """Rows -> input_ids, attention_mask and labels, int64 [B, T]. The mask comes from lengths, never from ids."""
        length = max(len(row.input_ids) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            gap = length - len(row.input_ids)
            columns = {
                "input_ids": (row.input_ids, [self.pad_token_id] * gap),
                "attention_mask": ([1] * len(row.input_ids), [0] * gap),
                "labels": (row.labels, [IGNORE_INDEX] * gap),
            }
            for name, (values, padding) in columns.items():
                batch[name].append(padding + values if side == "left" else values + padding)
        return {name: torch.tensor(values) for name, values in batch.items()}

    def prompt_batch(self, conversations: Sequence[tuple[Sequence[Any], Sequence[Message]]]) -> BatchFeature:
        """(pictures, messages) pairs -> what ``generate`` takes, padded on the left.

        Raises:
            PromptError: the number of pictures differs from what the messages speak of.
        """
        batch = self.prompt_ids(conversations)
        if images := [image for row, _ in conversations for image in row]:
            batch["pixel_values"] = self.pixel_values(images)
        return batch

    def prompt_ids(self, conversations: Sequence[tuple[Sequence[Any], Sequence[Message]]]) -> BatchFeature:
        """The words of ``prompt_batch`` without its pixels: input_ids and attention_mask int64 [B, T]."""
        for images, messages in conversations:
            check_counts(count_images(messages), len(images))
        batch = self.pad([self.encode_prompt(messages) for _, messages in conversations], "left")
        del batch["labels"]
        return BatchFeature(batch)

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Texts with literal ``<image>`` marks and their pictures -> input_ids, attention_mask, pixel_values.

        The texts are taken as they stand, without chat template. ``images`` is one picture, a list in the order of the
        marks, or one list for each text.
        """
        kwargs.pop("return_tensors", None)
        side = kwargs.pop("padding_side", "left")
        kwargs.pop("padding", None)
        if kwargs:
            raise ValueError(f"unknown argument {sorted(kwargs)[0]!r}; Processor takes images, text and padding_side")
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = _flat(images)
        check_counts(sum(t.count(IMAGE_TEXT) for t in texts), len(pictures))
        rows = [self._encode(_literal_spans(t, self.image_mode)) for t in texts]
        batch = self.pad(rows, side) if rows else {}
        batch.pop("labels", None)
        if pictures:
            batch["pixel_values"] = self.pixel_values(pictures)
        return BatchFeature(batch)

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, tokenize: bool = False, **kwargs: Any
    ) -> Any:
        """transformers' name for prompts from messages; pictures come from the parts' ``image``, ``path`` or ``url``.

        Returns text with ``<image>`` marks, or with ``tokenize=True`` the batch that ``generate`` takes.
        """
        rows = conversation if conversation and not isinstance(conversation[0], dict) else [conversation]
        if tokenize:
            return self.prompt_batch([(_pictures_of(messages), messages) for messages in rows])
        ask = kwargs.get("add_generation_prompt", False)
        texts = [
            "".join(
                IMAGE_TEXT if span.kind == "image" else span.text for span in self._spans(messages, training=not ask)
            )
            for messages in rows
        ]
        return texts if rows is conversation else texts[0]

    # --- back to words -----------------------------------------------------------------------------------------

    def decode_answers(self, sequences: Tensor, prompt_length: int) -> list[str]:
        """New tokens to text: sequences int64 [B, prompt + new] -> B answers, without specials and outer space."""
        return [self.decode_answer(row[prompt_length:].tolist()) for row in sequences]

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Tokens to text, without specials, outer space and placeholders."""
        vocabulary = len(self.tokenizer)
        known = [token for token in tokens if token < vocabulary]
        return str(self.tokenizer.decode(known, skip_special_tokens=True)).strip()

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _after_answer(spans: list[Span]) -> Span:
    """What the template writes at the end of a conversation that ends with an answer."""
    return Span("template") if spans[-1].learned else spans[-1]


def check_counts(num_placeholders: int, num_images: int) -> None:
    """Raise PromptError unless every ``<image>`` has its picture."""
    if num_placeholders != num_images:
        was = "image was" if num_images == 1 else "images were"
        cure = "add the image or drop the placeholder" if num_placeholders > num_images else "add an <image> for each"
        raise PromptError(f"prompt has {num_placeholders} <image> but {num_images} {was} given; {cure}")


def _literal_spans(text: str, image_mode: str) -> list[Span]:
    pieces = text.split(IMAGE_TEXT)
    spans: list[Span] = []
    for i, piece in enumerate(pieces):
        spans += [Span("image")] if i else []
        spans += [Span("template", piece)] if piece else []
    return sorted(spans, key=lambda span: span.kind != "image") if image_mode == "prefix" else spans


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [picture for item in images for picture in (item if isinstance(item, (list, tuple)) else [item])]


def _pictures_of(messages: Sequence[Message]) -> list[Any]:
    found = []
    for message in messages:
        for part in message["content"] if not isinstance(message["content"], str) else []:
            if part["type"] == "image":
                source = part.get("image") or part.get("path") or part.get("url")
                if source is None:
                    raise PromptError("an image part of the messages has no picture; give it as 'image' or 'path'")
                found.append(source)
    return found
