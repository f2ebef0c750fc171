"""I13: what training puts before an answer is the serving prompt, token for token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.processing.prompt import PromptError
from templates import STYLES, Kind, make_processor

KINDS: list[Kind] = ["bytes", "bpe", "pieces"]
PROCESSORS = {(style, kind, mode): make_processor(style, kind, image_mode=mode)
              for style in STYLES for kind in KINDS for mode in ("placeholder", "prefix")}  # fmt: skip


def image() -> dict[str, str]:
    return {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


CONVERSATIONS = {
    "one picture": [turn("user", image(), text("How many?")), turn("assistant", text("Two."))],
    "a caption": [turn("user", image()), turn("assistant", text("the red circle"))],
    "words only": [turn("user", text("hello")), turn("assistant", text("hi"))],
    "picture last": [turn("user", text("What is this?"), image()), turn("assistant", text("It is a square."))],
    "three turns": [
        turn("user", image(), text("How many?")), turn("assistant", text("Two.")),
        turn("user", text("And the colour?")), turn("assistant", text(" blue ")),
        turn("user", text("Is\n\nthis it?"), image(), text("or this"), image()), turn("assistant", text("no")),
    ],
    "a system text": [
        turn("system", text("Be brief.")),
        turn("user", image(), text("Where?")), turn("assistant", text("left")),
        turn("user", text("Sure?")), turn("assistant", text("yes\n")),
    ],
    "plain strings": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}],
}  # fmt: skip


def check(style: str, kind: Kind, mode: str, messages: list[dict[str, Any]]) -> None:
    processor = PROCESSORS[style, kind, mode]
    whole = processor.encode_conversation(messages)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # what the next turns bring is not known when this answer is asked for: compare with the row that ends here
        row = processor.encode_conversation(messages[: i + 1])
        prompt = processor.encode_prompt(messages[:i])
        length = len(prompt.input_ids)
        assert row.input_ids[:length] == prompt.input_ids
        assert row.labels[length] == row.input_ids[length] and len(row.input_ids) > length + 1
        assert prompt.num_images == row.num_images
        if mode == "placeholder":
            assert whole.input_ids[: len(row.input_ids)] == row.input_ids
            assert whole.labels[: len(row.labels)][length:] == row.labels[length:]


@pytest.mark.parametrize("mode", ["placeholder", "prefix"])
@pytest.mark.parametrize("name", list(CONVERSATIONS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", list(STYLES))
def test_training_text_starts_with_the_serving_prompt(style: str, kind: Kind, name: str, mode: str) -> None:
    check(style, kind, mode, CONVERSATIONS[name])


words = st.text(min_size=1, max_size=12).filter(str.strip) | st.sampled_from([" a", "b\n", "\n\nc", "<image>", "<eos>"])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(STYLES)), st.sampled_from(KINDS), st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_any_words(style: str, kind: Kind, pairs: list[tuple[str, str]]) -> None:
    messages = []
    for question, answer in pairs:
        messages += [turn("user", image(), text(question)), turn("assistant", text(answer))]
    check(style, kind, "placeholder", messages)


def test_labels_begin_right_where_the_prompt_ends() -> None:
    """Every token from the end of the prompt to the end of the turn is learned, and nothing before it."""
    for (style, kind, mode), processor in PROCESSORS.items():
        messages = CONVERSATIONS["one picture"]
        row, prompt = processor.encode_conversation(messages), processor.encode_prompt(messages[:1])
        start = len(prompt.input_ids)
        assert row.labels[:start] == [-100] * start, (style, kind, mode)
        assert row.labels[start:] == row.input_ids[start:], (style, kind, mode)
        assert row.labels[-1] == processor.end_of_turn_id, (style, kind, mode)


def test_a_template_that_refuses_says_so() -> None:
    processor = PROCESSORS["gemma", "bytes", "placeholder"]
    with pytest.raises(PromptError, match="refuses this conversation: turns must alternate"):
        processor.encode_prompt([turn("user", text("a")), turn("user", text("b"))])
