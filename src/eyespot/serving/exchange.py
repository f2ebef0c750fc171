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
from eyespot.serving.refusals import Refusal
from eyespot.serving.rows import Prompt
from eyespot.serving.sampling import Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

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
                raise timed_out(engine) from None
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
        images: Sequence[Image], messages: Sequence[Message], *, max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[str]:
        wish = Wish(max_new_tokens, Sampling(temperature, top_p))
        try:
            with seats.taken():
                yield from _pieces(engine, engine.prepare(images, messages), wish)
        except Refusal as refusal:
            raise ValueError(refusal.message) from refusal  # which the page shows as it is

    return talk


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
        raise timed_out(engine) from None
    if isinstance(event, Refusal):
        raise event
    return event


def timed_out(engine: Engine) -> Refusal:
    """What is said at a deadline."""
    return Refusal(
        f"the answer took more than {engine.limits.timeout_s:g} seconds, the limit of this server; ask for fewer "
        "tokens, or later",
        504,
        code="timeout",
    )
