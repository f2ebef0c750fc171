"""One model, one thread, many requests: answers join a running batch as they come and leave it as they end."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from eyespot.data.features import picture_digest
from eyespot.inference import MAX_NEW_TOKENS, Assistant
from eyespot.processing.images import open_image
from eyespot.processing.processor import check_counts
from eyespot.processing.prompt import Message, count_images, parts_of
from eyespot.serving.limits import Limits
from eyespot.serving.metrics import Metrics
from eyespot.serving.pieces import Pieces
from eyespot.serving.refusals import Refusal, timed_out
from eyespot.serving.rows import Picture, Prompt, Rows
from eyespot.serving.sampling import Sampler, Sampling, log_probabilities

T = TypeVar("T")
TOKENS_AT_ONCE = 2048  # of prompts that join in one step; growing answers wait for them
# a pass reads all weights, which takes about as long as the products of so many tokens. Calculated: on an H200
# (4.8 TB/s, 495 TFLOP/s in bfloat16) 103, on a Xeon at 2.5 GHz (10 GB/s, 150 GFLOP/s in float32) 30, its head 50
PASS_TOKENS = 96
CHARACTERS_PER_TOKEN = 32  # more than any tokenizer's average; a longer text is refused without being read
log = logging.getLogger(__name__)


class TokenScore(NamedTuple):
    """A token as text, its log-probability, and the likeliest ones in its place."""

    text: str
    log_prob: float
    top: list[tuple[str, float]]


class Piece(NamedTuple):
    """More of an answer. scores: of new tokens, if they were asked for; their text may still be held back."""

    text: str
    scores: list[TokenScore]


class End(NamedTuple):
    """The end of an answer, and its tokens: of the prompt, of those what was in memory, and its own."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    kept_tokens: int
    answer_tokens: int


Event = Piece | End | Refusal


@dataclass(frozen=True)
class Wish:
    """How an answer is wanted. top: how many log-probabilities of each token, None for none at all."""

    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    top: int | None = None


class Job:
    """An answer on its way. ``emit`` is called with its events, on the engine's thread; it must return at once."""

    def __init__(self, prompt: Prompt, wish: Wish, pieces: Pieces, emit: Callable[[Event], None]) -> None:
        self.prompt, self.wish, self.pieces, self.emit = prompt, wish, pieces, emit
        self.sampler = Sampler(wish.sampling)
        self.tokens: list[int] = []
        self.kept_tokens = 0
        self.arrived = time.monotonic()
        self.ended = self.cancelled = False

    def cancel(self) -> None:
        """Nobody wants the answer any more; the engine drops it before its next step."""
        self.cancelled = True


class Engine:
    """Answers with one model; a context manager, whose end lets running answers finish.

    Args:
        assistant: from here on only for this engine.
        name: of the model, for clients.
        limits, metrics: of the server.
    """

    def __init__(self, assistant: Assistant, name: str, limits: Limits, metrics: Metrics) -> None:
        self.assistant, self.name, self.limits, self.metrics = assistant, name, limits, metrics
        self.rows = Rows(assistant)
        self.joining: list[Job] = []
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.closing = False
        config = assistant.model.config.text_config.get_text_config()
        self.positions = int(getattr(config, "max_position_embeddings", None) or 1 << 62)
        ends = assistant.model.generation_config.eos_token_id
        self.end_ids = {ends} if isinstance(ends, int) else set(ends or ())
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self.words = threading.Lock()  # a tokenizer must not be told to split specials and be used at the same time
        self._thread = threading.Thread(target=self._work, name=f"eyespot-{name}", daemon=True)
        metrics.watch(name, lambda: len(self.waiting), lambda: len(self.running))

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Refuse what comes, finish what is there."""
        with self._changed:
            self.closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_well(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self.closing

    # --- for other threads -------------------------------------------------------------------------------------

    def prepare(self, pictures: Sequence[Any], messages: Sequence[Message]) -> Prompt:
        """A conversation as tokens and pixels.

        Args:
            pictures: files, their bytes or PIL images, in the order of their places in the messages.

        Raises:
            Refusal: more than the limits allow.
            ValueError: pictures that cannot be opened, messages that the template refuses, counts that differ.
        """
        check_counts(count_images(messages), len(pictures))
        self.limits.check_images(len(pictures))
        self._check_length(sum(map(_least_tokens, messages)), "about ")
        with self.words:
            ids = self.assistant.processor.encode_prompt(messages).input_ids
        self._check_length(len(ids))
        if not ids:
            raise Refusal("the messages hold neither words nor pictures; ask something", param="messages")
        image_id = self.assistant.model.config.image_token_id
        length = len(ids) - ids[::-1].index(image_id) if pictures else 0
        return Prompt(ids, tuple(map(self._picture, pictures)), length if length < len(ids) else 0)

    def submit(self, prompt: Prompt, wish: Wish, emit: Callable[[Event], None]) -> Job:
        """Put a request into the queue.

        Raises:
            Refusal: 503, the engine is closing; 400, a longer answer is wanted than there is.
        """
        if wish.max_new_tokens > (limit := self.limits.max_tokens):
            raise Refusal(
                f"max_tokens is {wish.max_new_tokens}, the limit is {limit}; ask for fewer", param="max_tokens"
            )
        job = Job(prompt, wish, Pieces(self._decode, wish.stops), emit)
        with self._changed:
            if not self.is_well:
                raise Refusal("the server is shutting down; ask another one", 503, code="shutting_down")
            self.waiting.append(job)
            self._changed.notify()
        return job

    def call(self, function: Callable[[], T]) -> T:
        """What a function returns that uses the model too; it runs on the engine's thread, between two steps.

        If it uses the processor, it must hold ``words`` meanwhile.

        Raises:
            Refusal: 503, the engine is closing; 504, its turn did not come in time.
        """
        future: Future[T] = Future()
        with self._changed:
            if not self.is_well:
                raise Refusal("the server is shutting down; ask another one", 503, code="shutting_down")
            self._calls.append((function, future))
            self._changed.notify()
        try:
            return future.result(self.limits.timeout_s)
        except TimeoutError:
            if not future.cancel():  # it has begun, or it failed so itself
                return future.result()
            raise timed_out(self.limits.timeout_s) from None

    def _picture(self, source: Any) -> Picture:
        opened = open_image(source, self.limits.max_pixels)
        return Picture(picture_digest(source), self.assistant.processor.pixel_values([opened])[0])

    def _check_length(self, length: float, about: str = "") -> None:
        limit = min(self.limits.max_prompt_tokens, self.positions - 1)
        if length > limit:
            raise Refusal(
                f"the prompt has {about}{length:.0f} tokens, the limit is {limit}; shorten it or show fewer pictures",
                param="messages",
                code="context_length_exceeded",
            )

    def _decode(self, tokens: Sequence[int]) -> str:
        with self.words:
            return self.assistant.processor.decode_tokens(tokens)

    # --- on the engine's thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        with self.assistant.folded():
            while self._has_work():
                try:
                    self._run_call()
                    with torch.inference_mode(), self.assistant.autocast():
                        self._turn()
                except Exception:  # answers are lost, but not the server
                    log.exception("a step of %s failed", self.name)
                    self._fail()

    def _has_work(self) -> bool:
        """Wait until there is some; False when there is none and none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self.running or self._calls or self.closing)
            return bool(self.waiting or self.running or self._calls)

    def _run_call(self) -> None:
        """One of them, so that answers go on between two."""
        if not self._calls:
            return
        function, future = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _turn(self) -> None:
        """Let new answers join, then give every answer one token more."""
        self._drop_ended()
        self._drop_waiting()
        self.joining = self._newcomers()
        for group in self._groups(self.joining):
            kept = all(self.rows.known(job.prompt) is not None for job in group)
            for job in group:
                job.kept_tokens = job.prompt.prefix_length if kept else 0
                self.metrics.waited.labels(self.name).observe(time.monotonic() - job.arrived)
            logits = self.rows.add([job.prompt for job in group])
            self.running += group
            self._grow(group, logits)
            self._drop_ended()
        self.joining = []
        if self.running:
            self.metrics.batch_rows.labels(self.name).observe(len(self.running))
            self._grow(self.running, self.rows.step([job.tokens[-1] for job in self.running]))
            self._drop_ended()

    def _newcomers(self) -> list[Job]:
        """The requests that have waited longest, as far as rows and tokens reach."""
        found: list[Job] = []
        tokens = 0
        while self.waiting and len(self.running) + len(found) < self.limits.max_batch and tokens < TOKENS_AT_ONCE:
            found.append(self.waiting.popleft())
            tokens += len(found[-1].prompt.ids)
        return found

    def _groups(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Jobs that join in one pass each. Another pass is worth it where it saves more padding, or more of the
        beginnings that are in memory, than it costs to read all weights once more."""
        known = [job for job in jobs if self.rows.known(job.prompt) is not None]
        if len(known) < len(jobs) and sum(job.prompt.prefix_length for job in known) <= PASS_TOKENS:
            known = []
        groups: list[list[Job]] = []
        for some in (known, [job for job in jobs if job not in known]):
            lengths = {job: len(job.prompt.ids) - (job.prompt.prefix_length if some is known else 0) for job in some}
            longest = 0
            for number, job in enumerate(sorted(some, key=lengths.__getitem__)):
                if number == 0 or len(groups[-1]) * (lengths[job] - longest) > PASS_TOKENS:
                    groups.append([])
                groups[-1].append(job)
                longest = lengths[job]
        return groups

    def _grow(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """One more token for each job from logits float [J, V]."""
        for job, token, row in zip(jobs, logits.argmax(-1).tolist(), logits, strict=True):
            if not job.ended:
                self._take(job, token if job.wish.sampling.is_greedy else job.sampler.choose(row), row)

    def _take(self, job: Job, token: int, logits: Tensor) -> None:
        if not job.tokens:
            self.metrics.first_token.labels(self.name).observe(time.monotonic() - job.arrived)
        if token in self.end_ids:
            self._finish(job, "stop", job.pieces.end())
            return
        job.tokens.append(token)
        text = job.pieces.add(token)
        scores = [] if job.wish.top is None else [self._score(logits, job.tokens, job.wish.top)]
        if text or scores:
            job.emit(Piece(text, scores))
        limit = min(job.wish.max_new_tokens, self.positions - len(job.prompt.ids))
        if job.pieces.stopped:
            self._finish(job, "stop")
        elif len(job.tokens) >= limit:
            self._finish(job, "length", job.pieces.end())

    def _score(self, logits: Tensor, tokens: Sequence[int], top: int) -> TokenScore:
        """Of the last token. Texts are those behind the token before: some decoders drop the space of a first word."""
        *before, token = tokens[-2:]
        known = self._decode(before)

        def text(token: int) -> str:
            together = self._decode([*before, token])
            return together[len(known) :] if together.startswith(known) else self._decode([token])

        log_prob, likeliest = log_probabilities(logits, token, top)
        return TokenScore(text(token), log_prob, [(text(other), p) for other, p in likeliest])

    def _finish(self, job: Job, reason: Literal["stop", "length"], text: str = "") -> None:
        job.ended = True
        self.metrics.prompt_tokens.labels(self.name).inc(len(job.prompt.ids))
        self.metrics.kept_tokens.labels(self.name).inc(job.kept_tokens)
        self.metrics.answer_tokens.labels(self.name).inc(len(job.tokens))
        self.metrics.answers.labels(self.name, reason).inc()
        self.metrics.answered.labels(self.name).observe(time.monotonic() - job.arrived)
        if text:
            job.emit(Piece(text, []))
        job.emit(End(reason, len(job.prompt.ids), job.kept_tokens, len(job.tokens)))

    def _end_if_cancelled(self, job: Job) -> bool:
        if job.cancelled and not job.ended:
            job.ended = True
            self.metrics.answers.labels(self.name, "cancelled").inc()
        return job.ended

    def _drop_ended(self) -> None:
        staying = [i for i, job in enumerate(self.running) if not self._end_if_cancelled(job)]
        if len(staying) < len(self.running):
            self.running = [self.running[i] for i in staying]
            self.rows.keep(staying)

    def _drop_waiting(self) -> None:
        """Who waits no more leaves at once: its pictures are in memory, and its seat is free already."""
        with self._changed:
            if any(job.cancelled for job in self.waiting):
                self.waiting = deque(job for job in self.waiting if not self._end_if_cancelled(job))

    def _fail(self) -> None:
        """Every answer that was growing or about to is lost."""
        lost = dict.fromkeys([*self.running, *self.joining])
        self.running, self.joining = [], []
        self.rows.clear()
        for job in lost:
            if not self._end_if_cancelled(job):
                job.ended = True
                self.metrics.answers.labels(self.name, "failed").inc()
                job.emit(Refusal("the model failed while it answered; try again, or tell who runs this server", 500))


def _least_tokens(message: Message) -> float:
    """About how many tokens the words of a message have at least, which costs no tokenizer anything."""
    lengths = [len(part.get("text", "")) for part in parts_of(message)]
    return sum(max(1.0, length / CHARACTERS_PER_TOKEN) for length in lengths if length)
