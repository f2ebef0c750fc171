"""Pictures and words to tensors, and back: the one path of training, evaluation and serving."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

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
from eyespot.processing.texts import TEXT_FOLDER, encode_alone, framed

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
        max_text: tokens at which a text that stands alone is cut; None if the model compares none with pictures.
        text_folder: the folder below the processor's own with the tokenizer of such texts; None if they are read by the
            language model.
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
        max_text: int | None = None,
        text_folder: str | None = None,
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
        self.max_text, self.text_folder = max_text, text_folder
        self.text_tokenizer: PreTrainedTokenizerBase | None = None
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
        whole = Encoded(encoded.input_ids[: last + 1], encoded.labels[: last + 1], encoded.num_images)
        row = self._cut(whole, max_length)
        if row.num_supervised == 0 < whole.num_supervised:
            raise PromptError(f"the answer starts beyond max_length={max_length}; raise max_length")
        return row

    def _cut(self, row: Encoded, max_length: int | None) -> Encoded:
        """The row up to ``max_length`` tokens, if there is such a limit; never through a picture."""
        ids = row.input_ids
        if max_length is None or len(ids) <= max_length:
            return row
        if self.image_token_id in ids[max_length:]:
            raise PromptError(
                f"{len(ids)} tokens with a picture beyond max_length={max_length}; raise max_length or use a "
                "connector with fewer tokens"
            )
        return Encoded(ids[:max_length], row.labels[:max_length], row.num_images)

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

    def _encode(self, spans: list[Span], bos: bool = True) -> Encoded:
        bos = bos and self.add_bos
        ids: list[int] = [self.tokenizer.bos_token_id] if bos else []
        labels = [IGNORE_INDEX] * len(ids)
        first_words = next((span for span in spans if span.kind != "image"), None)
        for span in spans:
            new = self._span_ids(span)
            if bos and span is first_words and new[:1] == ids[:1]:
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
        cuts = [match.start() + 1 for match in self.template_tokens.finditer(span.text)]
        pieces = [span.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(span.text)], strict=True)]
        rows = self.tokenizer(pieces, add_special_tokens=False, split_special_tokens=True).input_ids
        return [token for row in rows for token in row]

    @cached_property
    def template_tokens(self) -> re.Pattern[str]:
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

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts alone, to be compared with pictures: text_ids and text_mask int64 [N, T], padded on the right.

        Without a tokenizer of their own they are what the language model would answer, and end like an answer.

        Raises:
            ValueError: the model has no alignment head.
        """
        if self.max_text is None:
            raise ValueError("this model has no alignment head; train one with model.alignment and a stage of pairs")
        if self.text_tokenizer is not None:
            pad = self.text_tokenizer.pad_token_id or 0
            return framed(*encode_alone(self.text_tokenizer, texts), self.max_text, pad)
        first = [self.tokenizer.bos_token_id] if self.add_bos else []
        rows = [self._span_ids(Span("text", text)) for text in texts]
        return framed(first, rows, self.end_of_turn_id, self.max_text, self.pad_token_id)

    # --- folders -----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """transformers' own, and the tokenizer of texts alone in its folder."""
        if self.text_tokenizer is not None:  # first, so that an upload finds it
            self.text_tokenizer.save_pretrained(Path(save_directory) / TEXT_FOLDER)
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' own, and the tokenizer of texts alone if there is one."""
        processor: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.text_folder is not None:
            processor.text_tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=processor.text_folder, **kwargs
            )
        return processor

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

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding_side: Literal["left", "right"] = "left",
        truncation: bool = False,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with literal ``<image>`` marks and their pictures -> input_ids, attention_mask, pixel_values.

        The texts are taken as they stand, without chat template. ``images`` is one picture, a list in the order of the
        marks, or one list for each text. A row starts with BOS if the model wants one, and then with one only; with
        ``add_special_tokens=False`` if the text does. With ``truncation`` it ends at ``max_length``.
        """
        _take_batch_options(kwargs)
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = _flat(images)
        check_counts(sum(t.count(IMAGE_TEXT) for t in texts), len(pictures))
        rows = [
            self._encode(_literal_spans(t, self.image_mode), add_special_tokens or self._opens_with_bos(t))
            for t in texts
        ]
        rows = [self._cut(row, max_length if truncation else None) for row in rows]
        batch = self.pad(rows, padding_side) if rows else {}
        batch.pop("labels", None)
        if pictures:
            batch["pixel_values"] = self.pixel_values(pictures)
        return BatchFeature(batch)

    def _opens_with_bos(self, text: str) -> bool:
        return self.add_bos and text.startswith(self.tokenizer.bos_token)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_assistant_tokens_mask: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' name for messages to text or tensors; pictures come from the parts' ``image``, ``path`` or
        ``url``.

        Returns:
            Text with ``<image>`` marks, or one for each conversation. With ``tokenize=True`` what ``generate`` takes,
            as tensors ("pt") or lists: the prompt, if the last turn is a user's or ``add_generation_prompt`` is set,
            else the whole conversation as eyespot trains it. ``return_assistant_tokens_mask`` also takes the whole
            conversation and marks in ``assistant_masks`` int64 [B, T] what is learned.

        Raises:
            PromptError: a whole conversation with pictures is to be tokenized without its mask.
            ValueError: an argument that has no effect here.
        """
        if ignored := [name for name, value in kwargs.items() if value and name != "return_dict"]:
            raise ValueError(
                f"apply_chat_template cannot use {ignored[0]!r}; variables of the template are the processor's "
                "template_kwargs"
            )
        processor = self if chat_template in (None, self.chat_template) else self._with_template(chat_template)
        single = not conversation or isinstance(conversation[0], dict)
        rows = [conversation] if single else conversation
        if not tokenize:
            texts = [processor._text(messages, add_generation_prompt) for messages in rows]
            return texts[0] if single else texts
        asks = add_generation_prompt or all(messages[-1]["role"] == "user" for messages in rows)
        if asks and not return_assistant_tokens_mask:
            batch = processor.prompt_batch([(_pictures_of(messages), messages) for messages in rows])
        else:
            batch = processor._conversation_batch(rows, return_assistant_tokens_mask, processor_kwargs or {})
        return batch if return_tensors == "pt" else BatchFeature({name: v.tolist() for name, v in batch.items()})

    def _with_template(self, chat_template: str | None) -> Processor:
        other = copy.copy(self)
        other.chat_template = chat_template
        other.__dict__.pop("template_tokens", None)  # depends on the template
        return other

    def _text(self, messages: Sequence[Message], ask: bool) -> str:
        """The conversation as text that ``__call__`` turns into the ids of this processor: with BOS exactly once, and
        no further than the token that ends the last answer."""
        spans = self._spans(messages, training=not ask and messages[-1]["role"] == "assistant")
        if spans[-1].ends_turn:
            end = str(self.tokenizer.convert_ids_to_tokens(self._end_of_turn(spans[-1])))
            spans[-1] = Span("template", end)
        texts = [IMAGE_TEXT if span.kind == "image" else span.text for span in spans]
        if self.add_bos:
            bos = str(self.tokenizer.bos_token)
            words = next((i for i, span in enumerate(spans) if span.kind != "image"), 0)
            texts[words] = texts[words].removeprefix(bos)  # written by the template, perhaps behind a picture
            texts.insert(0, bos)
        return "".join(texts)

    def _conversation_batch(
        self, rows: Sequence[Sequence[Message]], with_mask: bool, options: Mapping[str, Any]
    ) -> BatchFeature:
        """Conversations with their answers, encoded as eyespot trains them."""
        pictures = [_pictures_of(messages) for messages in rows]
        if any(pictures) and not with_mask:
            raise PromptError(
                "a conversation with pictures and answers needs return_assistant_tokens_mask=True, because the "
                "placeholders of a picture cannot be labels; with TRL set assistant_only_loss=True in SFTConfig, or "
                "give its data as prompt and completion"
            )
        limit = options.get("max_length") if options.get("truncation") else None
        batch = self.pad(
            [self.encode_conversation(messages, limit) for messages in rows], options.get("padding_side", "left")
        )
        learned = (batch.pop("labels") != IGNORE_INDEX).long()
        if with_mask:
            batch["assistant_masks"] = learned
        if any(pictures):
            batch["pixel_values"] = self.pixel_values(_flat(pictures))
        return BatchFeature(batch)

    # --- back to words -----------------------------------------------------------------------------------------

    def decode_answers(self, sequences: Tensor, prompt_length: int) -> list[str]:
        """New tokens to text: sequences int64 [B, prompt + new] -> B answers, without specials and outer space."""
        return [self.decode_answer(row[prompt_length:].tolist()) for row in sequences]

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Tokens to text, without specials, outer space and placeholders."""
        return self.decode_tokens(tokens).strip()

    def decode_tokens(self, tokens: Sequence[int]) -> str:
        """The same with its outer space, as a part of an answer needs it."""
        vocabulary = len(self.tokenizer)
        known = [token for token in tokens if token < vocabulary]
        return str(self.tokenizer.decode(known, skip_special_tokens=True))

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


def _take_batch_options(options: dict[str, Any]) -> None:
    """Remove what transformers may say and what holds here anyway; raise ValueError for anything else."""
    always = {"return_tensors": ("pt", None), "padding": (True, "longest", None), "pad_to_multiple_of": (None,)}
    for name, values in always.items():
        if (given := options.pop(name, None)) not in values:
            raise ValueError(f"{name} is {given!r}, but Processor always gives padded tensors; leave it out")
    if options:
        raise ValueError(f"unknown argument {min(options)!r}; Processor takes images, text and options of its batch")


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
