"""A request and the events of its answer, for those who wait: a coroutine of the API, or a thread of the page."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from eyespot.processing.prompt import Message
from eyespot.serving.engine import End, Engine, Event, Piece, Wish
from eyespot.serving.limits import Seats
from eyespot.serving.refusals import Refusal, timed_out
from eyespot.serving.rows import Prompt
from eyespot.serving.sampling import Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

    from eyespot.serving.drawing import Trace
    from eyespot.serving.turns import Talk


async def events(engine: Engine, prompt: Prompt, wish: Wish, deadline: float) -> AsyncGenerator[Piece | End, None]:
    """The pieces of an answer and its end. Who stops asking, by closing or by being cancelled, stops the answer.

    Args:
        deadline: on the clock of ``time.monotonic``.

    Raises:
        Refusal: 503 or 500 from the engine, 504 at the deadline.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def emit(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens
            loop.call_soon_threadsafe(arrived.put_nowait, event)

    job = engine.submit(prompt, wish, emit)
    try:
        while True:
            try:
                event = await asyncio.wait_for(arrived.get(), deadline - time.monotonic())
            except TimeoutError:
                raise timed_out(engine.limits.timeout_s) from None
            if isinstance(event, Refusal):
                raise event
            yield event
            if isinstance(event, End):
                return
    finally:
        job.cancel()


async def whole(engine: Engine, prompt: Prompt, wish: Wish, deadline: float) -> tuple[list[Piece], End]:
    """The same at once."""
    pieces: list[Piece] = []
    async with aclosing(events(engine, prompt, wish, deadline)) as found:
        async for event in found:
            if isinstance(event, End):
                return pieces, event
            pieces.append(event)
    raise RuntimeError("an answer without end")


def talk_with(engine: Engine, seats: Seats) -> Talk:
    """The engine as the page asks it: with the same seats, queue and limits as everybody."""

    def talk(
        pictures: Sequence[str], messages: Sequence[Message], *, max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[str]:
        wish = Wish(max_new_tokens, Sampling(temperature, top_p))
        with _told(), seats.taken():
            yield from _pieces(engine, engine.prepare(pictures, messages), wish)

    return talk


def trace_with(engine: Engine, seats: Seats, trace: Trace) -> Trace:
    """The same for what an answer depended on, which is found between two steps of the engine."""

    def traced(images: Sequence[Image], messages: Sequence[Message]) -> Image:
        def alone() -> Image:
            with engine.words:
                return trace(images, messages)

        with _told(), seats.taken():
            return engine.call(alone)

    return traced


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A refusal as an error that the page shows as it is."""
    try:
        yield
    except Refusal as refusal:
        raise ValueError(refusal.message) from refusal


def _pieces(engine: Engine, prompt: Prompt, wish: Wish) -> Iterator[str]:
    deadline = time.monotonic() + engine.limits.timeout_s
    arrived: queue.SimpleQueue[Event] = queue.SimpleQueue()
    job = engine.submit(prompt, wish, arrived.put)
    try:
        while not isinstance(event := _next(arrived, deadline, engine), End):
            yield event.text
    finally:
        job.cancel()


def _next(arrived: queue.SimpleQueue[Event], deadline: float, engine: Engine) -> Piece | End:
    try:
        event = arrived.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise timed_out(engine.limits.timeout_s) from None
    if isinstance(event, Refusal):
        raise event
    return event
