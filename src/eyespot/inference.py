"""Ask a trained model: ``eyespot.load(path).ask(image, question)``. Evaluation and command line go through here too."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer

from eyespot.branching import answer_scores, can_branch, greedy_scored, sum_by_owner, token_scores
from eyespot.compose import load_parts
from eyespot.data.features import picture_digest
from eyespot.devices import choose_device, has_fast_bfloat16
from eyespot.models.vlm import VLM
from eyespot.processing.processor import IGNORE_INDEX, Encoded, Processor, check_counts
from eyespot.processing.prompt import Message, count_images

Conversation = tuple[Sequence[Any], Sequence[Message]]
"""Pictures, and the turns that show them."""

MAX_NEW_TOKENS = 128
FEATURE_BYTES = 256_000_000  # of encoded pictures kept by an Assistant
PREFIX_BYTES = 256_000_000  # of keys and values up to the last picture of a prompt, kept for the next question
# these of generate's options need a cache of their own kind, or of more rows than the prompt has
OWN_CACHE = {"num_beams", "num_return_sequences", "cache_implementation", "past_key_values", "use_cache"}


def user_turn(images: Sequence[Any], question: str) -> list[Message]:
    """The one way a question about pictures becomes a conversation: pictures first, then the words."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


class Answer(NamedTuple):
    """What a model said, and the log-probability of all its tokens, the end included."""

    text: str
    log_prob: float


class AnswerScore(NamedTuple):
    """Of a given answer: the log-probability of all its tokens, and whether greedy decoding would have said it."""

    log_prob: float
    is_greedy: bool


class _Likelihood(LogitsProcessor):
    """Adds up the log-probabilities of the likeliest tokens while transformers' generate chooses them.

    Attributes:
        log_probs: float32 [B], up to and with the first end token of each answer.
    """

    def __init__(self, end_ids: Collection[int]) -> None:
        self.end_ids = end_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not hasattr(self, "log_probs"):
            self.ends = torch.tensor(sorted(self.end_ids), device=scores.device)
            self.log_probs = torch.zeros(len(scores), device=scores.device)
            self.going = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        best, tokens = scores.float().max(-1)
        self.log_probs += (best - scores.float().logsumexp(-1)) * self.going
        self.going &= ~torch.isin(tokens, self.ends)
        return scores


class _Closed(threading.Event, StoppingCriteria):
    """Ends transformers' generate when it is set; all rows at once."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], self.is_set(), dtype=torch.bool, device=input_ids.device)


class Assistant:
    """A model with its processor on a device.

    Args:
        model: in evaluation mode from here on.
        processor: the one saved beside it.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
    """

    def __init__(self, model: VLM, processor: Processor, device: str = "auto") -> None:
        self.device = choose_device(device)
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]
        self.processor = processor
        self._features: dict[Hashable, Tensor] = {}
        self._prefixes: dict[Hashable, Any] = {}
        self._remembering = threading.RLock()  # a server asks from several threads

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_remembering"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remembering = threading.RLock()  # a copy has a lock of its own

    @overload
    def ask(self, images: Any, question: str, **options: Any) -> str: ...

    @overload
    def ask(self, images: Any, question: Sequence[str], **options: Any) -> list[str]: ...

    def ask(self, images: Any, question: str | Sequence[str], **options: Any) -> str | list[str]:
        """One answer about one picture or a list of them (paths, bytes, PIL; an empty list asks without a picture).

        Several questions get a list of answers, each as if it were asked alone, and share the work on the pictures.
        ``options`` are those of ``generate_text``.
        """
        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        if isinstance(question, str):
            return self.generate_text([(pictures, user_turn(pictures, question))], **options)[0]
        conversations = [(pictures, user_turn(pictures, text)) for text in question]
        if not conversations or set(options) - {"max_new_tokens"}:
            return self.generate_text(conversations, **options) if conversations else []
        return self.answer_batch(conversations, options.get("max_new_tokens", MAX_NEW_TOKENS))

    def stream(self, images: Any, question: str, **options: Any) -> Iterator[str]:
        """The same answer in pieces, as they are made."""
        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        return self.stream_conversation((pictures, user_turn(pictures, question)), **options)

    def stream_conversation(self, conversation: Conversation, **options: Any) -> Iterator[str]:
        """The next answer of a conversation in pieces; the model stops when the iterator is closed.

        ``options`` are those of ``generate_text``.
        """
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = _Closed()
        options["stopping_criteria"] = [*options.get("stopping_criteria", ()), closed]
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self.generate_text([conversation], streamer=streamer, **options)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work)
        thread.start()
        started = False
        try:
            for piece in streamer:
                piece = piece if started else piece.lstrip()
                started = started or bool(piece)
                if piece:
                    yield piece
        finally:
            closed.set()
            thread.join()
        if failure:
            raise failure[0]

    def answer_batch(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """The texts of ``answer_scored``."""
        return [answer.text for answer in self.answer_scored(conversations, max_new_tokens)]

    def answer_scored(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Answer]:
        """One greedy answer for each (pictures, messages) pair; messages end with a user turn.

        Pairs about the same pictures share one image prefix where the language model allows it.
        """
        if len(conversations) < 2 or not can_branch(self.model):
            likelihood = _Likelihood(self._end_ids())
            texts = self.generate_text(conversations, max_new_tokens=max_new_tokens, logits_processor=[likelihood])
            return [Answer(*row) for row in zip(texts, likelihood.log_probs.tolist(), strict=True)]
        prompts = self._rows(conversations, self.processor.encode_prompt)
        room = self._room(max(len(encoded.input_ids) for encoded, _, _ in prompts))
        with self.autocast():
            rows, log_probs = greedy_scored(
                self.model,
                prompts,
                self.features,
                min(max_new_tokens, room),
                self._end_ids(),
                self.processor.pad_token_id,
            )
        return [Answer(*row) for row in zip(map(self.processor.decode_answer, rows), log_probs, strict=True)]

    @torch.inference_mode()
    def score_answers(self, conversations: Sequence[Conversation]) -> list[AnswerScore]:
        """How likely the model finds what the assistant says in each (pictures, messages) pair, its end included.

        Pairs about the same pictures share one image prefix where the language model allows it.
        """
        if not conversations:
            return []
        rows = self._rows(conversations, self.processor.encode_conversation)
        self._room(max(len(encoded.input_ids) for encoded, _, _ in rows) - 1)
        with self.autocast():
            if can_branch(self.model):
                scores = answer_scores(self.model, rows, self.features, self.processor.pad_token_id)
            else:
                scores = self._scores_alone(
                    [encoded for encoded, _, _ in rows], [i for _, images, _ in rows for i in images]
                )
        return [AnswerScore(*score) for score in zip(*scores, strict=True)]

    def _scores_alone(self, rows: Sequence[Encoded], images: Sequence[Any]) -> tuple[list[float], list[bool]]:
        """``answer_scores`` with one row for each conversation."""
        batch = {name: tensor.to(self.device) for name, tensor in self.processor.pad(rows, "right").items()}
        labels = batch.pop("labels")[:, 1:]
        features = self.features(images) if images else None
        hidden = self.model(**batch, image_features=features, skip_logits=True).last_hidden_state[:, :-1]
        learned = labels != IGNORE_INDEX
        return sum_by_owner(
            *token_scores(self.model, hidden[learned], labels[learned]), learned.nonzero()[:, 0].cpu(), len(rows)
        )

    def _rows(
        self, conversations: Sequence[Conversation], encode: Callable[[Sequence[Message]], Encoded]
    ) -> list[tuple[Encoded, list[Any], Hashable]]:
        """What ``eyespot.branching`` takes."""
        for images, messages in conversations:
            check_counts(count_images(messages), len(images))
        return [
            (encode(messages), list(images), tuple(map(picture_digest, images))) for images, messages in conversations
        ]

    def _end_ids(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 matrix products for a bfloat16 model (its adapters are float32), nothing for a float32 one."""
        if self.model.compute_dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def folded(self) -> AbstractContextManager[None]:
        """For many answers in a row: while it lasts, adapters are part of the float32 weights they adapt."""
        if not self.model.config.lora:
            return nullcontext()
        from eyespot.models.lora_linear import folded

        return folded(self.model)

    @torch.inference_mode()
    def features(self, images: Sequence[Any]) -> Tensor:
        """Pictures -> patch features float [N, P, E]; a picture that was encoded lately is not encoded again."""
        keys = [picture_digest(image) for image in images]
        with self._remembering:
            missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._features}
            if missing:
                pixels = self.processor.pixel_values(list(missing.values())).to(self.device)
                with self.autocast():
                    encoded = self.model.encode_images(pixels)
                self._features.update(zip(missing, encoded, strict=True))
            found = torch.stack([self._features[key] for key in keys])
            while len(self._features) * found[0].nbytes > FEATURE_BYTES:
                del self._features[next(iter(self._features))]
        return found

    def _takes_prefix(self, options: Mapping[str, Any]) -> bool:
        return not OWN_CACHE & set(options) and "past_key_values" in self.model.language_inputs

    def _room(self, prompt_length: int) -> int:
        limit = getattr(self.model.config.text_config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and prompt_length >= limit:
            raise ValueError(
                f"the prompt has {prompt_length} tokens but the language model has {limit} positions; shorten the "
                "question or show fewer pictures"
            )
        return limit - prompt_length if limit is not None else sys.maxsize

    def forget(self) -> None:
        """Drop what is remembered of pictures, for instance after the model was trained."""
        self._features.clear()
        self._prefixes.clear()

    def prefix(self, input_ids: Tensor, images: Sequence[Any]) -> Any:
        """Keys and values of a prompt up to its last picture; a prefix that was computed lately comes from memory.

        input_ids: int64 [1, T]. Returns a cache of transformers, the caller's own.
        """
        length = int((input_ids[0] == self.model.config.image_token_id).nonzero().max()) + 1
        key = (tuple(map(picture_digest, images)), tuple(input_ids[0, :length].tolist()))
        with self._remembering:
            if key not in self._prefixes:
                self._prefixes[key] = self.model.prefill(input_ids[:, :length], self.features(images))
            self._prefixes[key] = found = self._prefixes.pop(key)  # the last one used is dropped last
            while len(self._prefixes) > 1 and sum(map(_num_bytes, self._prefixes.values())) > PREFIX_BYTES:
                del self._prefixes[next(iter(self._prefixes))]
        return copy.deepcopy(found)

    @torch.inference_mode()
    def generate_text(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        **options: Any,
    ) -> list[str]:
        """Answers for a batch of conversations.

        Args:
            conversations: (pictures, messages) pairs.
            max_new_tokens: limit of each answer; the end of the model's positions is another.
            temperature: 0 is greedy (or beam search with ``num_beams``), above 0 samples.
            options: further arguments of transformers' generate: top_p, top_k, num_beams, repetition_penalty, streamer;
                cache_implementation="static" lets transformers compile the steps on a GPU.
        """
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or above")
        batch = self.processor.prompt_ids(conversations).to(self.device)
        room = self._room(batch["input_ids"].shape[1])
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        images = [image for pictures, _ in conversations for image in pictures]
        with self.autocast():
            if images and len(conversations) == 1 and self._takes_prefix(options):
                batch["past_key_values"] = self.prefix(batch["input_ids"], images)
                batch["inputs_embeds"] = self.model.embed_text(batch["input_ids"])  # read behind the prefix only
            elif images:
                batch["image_features"] = self.features(images)
            sequences = self.model.generate(**batch, max_new_tokens=min(max_new_tokens, room), **sampling, **options)
        return self.processor.decode_answers(sequences, batch["input_ids"].shape[1])


def _num_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def load(path: str | Path, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None) -> Assistant:
    """A trained model, ready to be asked.

    Args:
        path: folder that training wrote (or a Hub name): a whole model, or a checkpoint of a run.
        device: "auto", "cpu", "cuda", "mps".
        dtype: "auto" (as saved, but float32 where the device is slow in bfloat16), "float32", "bfloat16", or "int8"
            (for CPUs: quicker, with answers that are close to those of float32).
        adapter: folder of an adapter that peft (TRL, for example) trained on this model; it is added to the weights.

    Raises:
        ValueError: nothing usable at ``path`` or ``adapter``, no such device, or int8 on another one than the CPU.
    """
    model, processor = load_parts(path, "float32" if dtype == "int8" else dtype)
    if adapter is not None:
        model.add_adapter_folder(adapter)
    model.requires_grad_(False)  # adapters over weights that do not learn have quicker ways
    chosen = choose_device("cpu" if dtype == "int8" and device == "auto" else device)
    if dtype == "int8" or (dtype == "auto" and not has_fast_bfloat16(chosen)):
        model = model.float()  # type: ignore[no-untyped-call]
    if dtype == "int8":
        from eyespot.models.int8 import to_int8

        to_int8(model.to(chosen))  # type: ignore[arg-type]
    return Assistant(model, processor, str(chosen))
