"""What is asked and answered on the page, without a browser: histories, notes, figures, two models at once."""

from __future__ import annotations

import logging
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eyespot
from eyespot.data.boxes import Box, draw_boxes, parse_boxes
from eyespot.inference import Assistant, user_turn
from eyespot.processing.images import open_image
from eyespot.relevance import read_answer
from eyespot.serving.drawing import SHORTEST, trace_of, with_boxes
from eyespot.serving.turns import (
    NO_PICTURE,
    NO_QUESTION,
    NOTHING,
    Turn,
    answered,
    conversation,
    merged,
    next_turn,
    shown,
)

CHARACTERS = f"char:{string.ascii_letters}{string.punctuation} \n"
HOW = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9}


@pytest.fixture
def red(tmp_path: Path) -> str:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Image.Image], str]:
    def write(figure: Image.Image) -> str:
        file = tmp_path / f"figure-{len(list(tmp_path.glob('figure-*')))}.png"
        figure.save(file)
        return str(file)

    return write


class Fake:
    """A model with a fixed answer, which remembers what it was asked."""

    def __init__(self, *pieces: str, error: Exception | None = None) -> None:
        self.pieces, self.error, self.asked = pieces, error, list[Any]()

    def __call__(self, pictures: Sequence[str], messages: Sequence[Any], **options: Any) -> Iterator[str]:
        self.asked.append(([open_image(picture) for picture in pictures], messages, options))
        yield from self.pieces
        if self.error is not None:
            raise self.error


def text(message: Any) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def test_the_second_turn_holds_the_first_and_no_picture_twice(red: str) -> None:
    first = Turn("what?", red, answer="a rose")
    second = next_turn([first], "which colour?", red)
    files, messages = conversation([first, second])
    assert second.picture is None and files == [red]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [text(message) for message in messages] == ["what?", "a rose", "which colour?"]
    assert messages[0]["content"][0] == {"type": "image"} and len(messages[2]["content"]) == 1


def test_another_picture_belongs_to_its_own_turn(red: str) -> None:
    turns = [Turn("what?", red, answer="a rose"), next_turn([Turn("", red, answer="x")], "and this?", "blue.png")]
    files, messages = conversation(turns)
    assert files == [red, "blue.png"] and messages[2] == user_turn(["blue.png"], "and this?")[0]


def test_a_turn_that_failed_is_forgotten_but_its_picture_is_asked_about_again(red: str) -> None:
    failed = Turn("what?", red, note="the queue is full")
    again = next_turn([failed], "what?", red)
    assert conversation([failed, again]) == ([red], user_turn([red], "what?"))


def test_answers_arrive_in_pieces_with_their_options(red: str, save: Any) -> None:
    talk = Fake("a ", "red ", "rose ")
    steps = list(answered([Turn("what?", red)], talk, save, **HOW))
    assert [turns[-1].answer for turns in steps] == ["", "a ", "a red ", "a red rose ", "a red rose"]
    ((images, messages, options),) = talk.asked
    assert images[0].size == (20, 10) and messages == user_turn([red], "what?") and options == HOW


def test_boxes_of_the_answer_and_its_trace_are_figures(red: str, save: Any) -> None:
    seen: list[Any] = []

    def trace(images: Sequence[Image.Image], messages: Sequence[Any]) -> Image.Image:
        seen.append(messages)
        return Image.new("L", (4, 4))

    *_, last = answered([Turn("where?", red)], Fake("10 10 50 90"), save, trace, **HOW)
    (boxes, _), (traced, _) = last[-1].figures
    assert open_image(traced).size == (4, 4) and text(seen[0][-1]) == "10 10 50 90"
    expected = draw_boxes(Image.new("RGB", (SHORTEST, SHORTEST // 2), "red"), [Box(10 / 99, 10 / 99, 50 / 99, 90 / 99)])
    assert open_image(boxes).tobytes() == expected.tobytes()


def test_without_a_box_there_is_no_figure(red: str, save: Any) -> None:
    *_, last = answered([Turn("what?", red)], Fake("a rose of 2020"), save, **HOW)
    assert last[-1].figures == ()


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("dog 10 10 50 50, cat: 60 60 90 90", ["dog", "cat"]),
        ("10 10 50 50; 60 60 90 90", None),
        ("a very long-winded description of it 10 10 50 50", ["a very long-winded desc…"]),
    ],
)
def test_boxes_with_names_carry_them(answer: str, labels: list[str] | None) -> None:
    picture = Image.new("RGB", (600, 600), "white")
    drawn = with_boxes(picture, answer)
    assert drawn is not None and drawn.tobytes() == draw_boxes(picture, parse_boxes(answer), labels).tobytes()


@pytest.mark.parametrize(
    ("question", "talk", "note"),
    [
        ("hello?", Fake("hi"), NO_PICTURE),
        ("hello?", Fake(), NOTHING),
        ("", Fake("hi"), NO_QUESTION),
        ("hello?", Fake("h", error=ValueError("the queue is full; wait")), "the queue is full; wait"),
        ("hello?", Fake(error=RuntimeError("boom")), "RuntimeError: boom"),
    ],
)
def test_notes_say_what_there_is_to_say(
    question: str, talk: Fake, note: str, save: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        *_, last = answered([Turn(question)], talk, save, **HOW)
    assert last[-1].note == note
    assert bool(caplog.records) == isinstance(talk.error, RuntimeError)


def test_a_broken_picture_is_a_note(tmp_path: Path, save: Any) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    talk = Fake("never said")
    *_, last = answered([Turn("what?", str(tmp_path / "broken.png"))], talk, save, **HOW)
    assert "is not a picture" in last[-1].note and not talk.asked


def test_a_chat_shows_texts_as_they_are_and_figures_and_notes_with_a_title(red: str) -> None:
    messages = shown([Turn("<b>what</b>?", red, "    a rose", (("f.png", "Boxes"),)), Turn("and?", note="full")])
    assert [message["role"] for message in messages] == ["user", "assistant", "assistant", "user", "assistant"]
    assert messages[0]["content"] == [{"path": red}, {"type": "text", "text": "&lt;b&gt;what&lt;/b&gt;?"}]
    assert messages[1]["content"][0]["text"] == "    a rose"
    assert messages[2] == {"role": "assistant", "content": {"path": "f.png"}, "metadata": {"title": "Boxes"}}
    assert messages[4]["content"][0]["text"] == "full" and messages[4]["metadata"]["title"] == "Note"


def test_two_streams_do_not_wait_for_each_other() -> None:
    gate = threading.Event()

    def slow() -> Any:
        assert gate.wait(10)
        yield "slow"

    def quick() -> Any:
        yield from "ab"

    found = merged([slow(), quick()])
    assert [next(found), next(found)] == [(1, "a"), (1, "b")]
    gate.set()
    assert list(found) == [(0, "slow")]


def test_whoever_stops_reading_stops_the_streams() -> None:
    ended = threading.Event()

    def endless() -> Any:
        try:
            while True:
                yield 1
        finally:
            ended.set()

    found: Any = merged([endless()])
    assert next(found) == (0, 1)
    found.close()
    assert ended.wait(10)


# --- with a real model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 512, **sizes}, "tokenizer": CHARACTERS},
    )
    return Assistant(model, processor, "cpu")


def asked(*answers: str) -> list[Any]:
    picture = [Image.new("RGB", (20, 10), "red")]
    messages: list[Any] = []
    for number, answer in enumerate(answers):
        messages += user_turn([] if number else picture, "what?")
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return [picture, messages]


def test_streamed_conversations_equal_whole_answers(assistant: Assistant) -> None:
    pictures, messages = asked("a rose")
    chat = (pictures, [*messages, *user_turn([], "why?")])
    whole = assistant.generate_text([chat], max_new_tokens=12)[0]
    assert "".join(assistant.stream_conversation(chat, max_new_tokens=12)).strip() == whole


def test_a_closed_stream_stops_the_model(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    forward = assistant.model.language.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(assistant.model.language, "forward", counted)
    stream: Any = assistant.stream(Image.new("RGB", (20, 10)), "what?", max_new_tokens=300, min_new_tokens=300)
    next(stream)
    stream.close()
    assert len(steps) < 200, "the model went on to its last token"


def test_only_the_last_answer_is_traced(assistant: Assistant) -> None:
    alone, second = read_answer(assistant, *asked("two words")), read_answer(assistant, *asked("no", "two words"))
    assert second.words == alone.words == ("two", "words")
    assert second.input_ids[0, second.places].tolist() == alone.input_ids[0, alone.places].tolist()


def test_a_trace_is_a_picture_that_depends_on_the_answer(assistant: Assistant) -> None:
    trace = trace_of(assistant)
    one, other = trace(*asked("a rose")), trace(*asked("something else"))
    assert max(one.size) == SHORTEST and one.tobytes() != other.tobytes()
    with pytest.raises(ValueError, match="2 pictures were given, but words are traced back to exactly 1"):
        trace([Image.new("RGB", (9, 9))] * 2, [*user_turn([1, 2], "?"), *asked("x")[1][1:]])
