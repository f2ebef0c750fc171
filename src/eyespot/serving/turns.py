"""What was asked and answered on the page, as a model reads it and as a chat shows it; no web framework in here."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol, TypeVar

from PIL.Image import Image

from eyespot.inference import user_turn
from eyespot.processing.images import open_image
from eyespot.processing.prompt import Message
from eyespot.serving.drawing import Trace, with_boxes

T = TypeVar("T")
NOTHING = "The model answered nothing."
NO_QUESTION = "Nothing was asked. Write a question, or give a picture."
NO_PICTURE = "No picture was given, so this answers the words alone."


class Talk(Protocol):
    """A model that goes on with a conversation. Pictures are files, in the order of their places in the messages."""

    def __call__(
        self,
        pictures: Sequence[str],
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> Iterator[str]:
        """The next answer, in pieces."""


@dataclass(frozen=True)
class Turn:
    """A question and what came of it.

    picture: file that the turn adds to the conversation.
    answer: as far as it has come. figures: (file, what it shows), below the answer.
    note: what has to be said about the answer, or why there is none.
    """

    question: str
    picture: str | None = None
    answer: str = ""
    figures: tuple[tuple[str, str], ...] = ()
    note: str = ""


def next_turn(turns: Sequence[Turn], question: str, picture: str | None) -> Turn:
    """A new question. The picture belongs to it unless it is the last one that the conversation shows already."""
    known = [turn.picture for turn in turns if turn.picture and turn.answer][-1:]
    return Turn(question, None if [picture] == known else picture)


def conversation(turns: Sequence[Turn]) -> tuple[list[str], list[Message]]:
    """Files of pictures, and messages up to the last turn; earlier turns without an answer are left out."""
    kept = [turn for turn in turns[:-1] if turn.answer] + [turns[-1]]
    messages: list[Message] = []
    for turn in kept:
        messages += user_turn([turn.picture] if turn.picture else [], turn.question)
        if turn.answer:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return [turn.picture for turn in kept if turn.picture], messages


def answered(
    turns: Sequence[Turn],
    talk: Talk,
    save: Callable[[Image], str],
    trace: Trace | None = None,
    **options: Any,
) -> Generator[list[Turn]]:
    """The turns again each time that the last of them grows: by a piece of its answer, then by figures.

    A model that fails is no end of the conversation: the reason becomes the note of the turn.

    Args:
        turns: the last one has only been asked yet.
        save: writes a figure to a file.
        options: max_new_tokens, temperature, top_p.
    """
    *earlier, turn = turns
    if not turn.question and turn.picture is None:
        yield [*earlier, dataclasses.replace(turn, note=NO_QUESTION)]
        return
    yield [*earlier, turn]
    try:
        files, messages = conversation(turns)
        if not files:
            turn = dataclasses.replace(turn, note=NO_PICTURE)
        for piece in talk(files, messages, **options):
            turn = dataclasses.replace(turn, answer=turn.answer + piece)
            yield [*earlier, turn]
        turn = dataclasses.replace(turn, answer=turn.answer.strip(), note=turn.note if turn.answer.strip() else NOTHING)
        yield [*earlier, turn]
        for figure, shows in _figures(files, [*earlier, turn], trace):
            turn = dataclasses.replace(turn, figures=(*turn.figures, (save(figure), shows)))
            yield [*earlier, turn]
    except ValueError as refusal:
        yield [*earlier, dataclasses.replace(turn, note=str(refusal))]
    except Exception as failure:
        logging.getLogger(__name__).exception("a question on the page got no answer")
        yield [*earlier, dataclasses.replace(turn, note=f"{type(failure).__name__}: {failure}")]


def _figures(files: Sequence[str], turns: Sequence[Turn], trace: Trace | None) -> Iterator[tuple[Image, str]]:
    """Of pictures that the model has seen, and that therefore can be opened."""
    if not files or not turns[-1].answer:
        return
    images = [open_image(file) for file in files]
    if (boxes := with_boxes(images[-1], turns[-1].answer)) is not None:
        yield boxes, "The boxes of the answer"
    if trace is not None:
        yield trace(images, conversation(turns)[1]), "What the answer depended on"


def merged(streams: Sequence[Generator[T]]) -> Iterator[tuple[int, T]]:
    """Items of several generators as they come, with the number of each one's generator.

    Each runs in its own thread, so none waits for another. When this iterator is closed, they are closed at their next
    item.
    """
    arrived: queue.SimpleQueue[tuple[int, T] | None] = queue.SimpleQueue()
    closed = threading.Event()

    def read(number: int, stream: Generator[T]) -> None:
        try:
            with closing(stream):
                for item in stream:
                    if closed.is_set():
                        return
                    arrived.put((number, item))
        finally:
            arrived.put(None)

    for number, stream in enumerate(streams):
        threading.Thread(target=read, args=(number, stream), daemon=True).start()
    try:
        for _ in streams:
            while (item := arrived.get()) is not None:
                yield item
    finally:
        closed.set()


def shown(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The same as messages of a chat; figures and notes have a title."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        asked = [{"path": turn.picture}, _text(turn.question)] if turn.picture else [_text(turn.question)]
        messages.append({"role": "user", "content": asked})
        if turn.answer:
            messages.append({"role": "assistant", "content": [_text(turn.answer)]})
        for file, title in turn.figures:
            messages.append({"role": "assistant", "content": {"path": file}, "metadata": {"title": title}})
        if turn.note:
            messages.append({"role": "assistant", "content": [_text(turn.note)], "metadata": {"title": "Note"}})
    return messages


def _text(text: str) -> dict[str, Any]:
    """A chat shows HTML, but neither people nor models are taken to write it."""
    return {"type": "text", "text": escape(text, quote=False)}
