"""Conversations as text spans: what is template, what a person wrote, what is a picture, what is learned.

A chat template (Jinja, the language model's own or one of ours) is rendered with marks in place of every picture and
every text. Cutting the result at the marks gives the spans, so labels are known by construction and nothing that a
person types can be mistaken for a token of the template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
Kind = Literal["template", "text", "image"]

# `images` are the pictures that open a turn, `text` the rest of it, `content` both; `generation` encloses what is
# learned, for other trainers that look for it
TEMPLATES = {
    "plain": (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}Assistant: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{{ '\\n' }}"
        "{% else %}{{ m.images }}{{ '\\n' if m.images else '' }}"
        "{{ 'Human: ' if m.role == 'user' else '' }}{{ m.text }}{{ '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "raw": (
        "{% set ns = namespace(text=false) %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ ' ' if ns.text else '' }}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% set ns.text = m.text != '' %}{% endif %}{% endfor %}"
    ),
}
_MARK = re.compile("\ue000(\\d+)\ue001")


class PromptError(ValueError):
    """A conversation that cannot become a prompt or a training row; the message says why."""


@dataclass(frozen=True)
class Span:
    """A piece of a prompt. ``learned``: the assistant's words; ``ends_turn``: the template text right after them."""

    kind: Kind
    text: str = ""
    learned: bool = False
    ends_turn: bool = False


class _Generation(Extension):
    """transformers' ``{% generation %}`` marks what an assistant writes; here labels come from spans, so it has no use.

    Source: https://huggingface.co/docs/transformers/main/en/chat_templating_writing
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _raise(message: str) -> None:
    raise PromptError(f"the chat template refuses this conversation: {message}")


def parts_of(message: Message) -> list[Mapping[str, Any]]:
    """The content of a message as a list of parts; plain text is one text part."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def count_images(messages: Sequence[Message]) -> int:
    """Number of pictures that a conversation speaks of."""
    return sum(part["type"] == "image" for message in messages for part in parts_of(message))


class _Marked:
    """A conversation with a mark in place of every part."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.parts: list[tuple[Mapping[str, Any], bool]] = []
        self.messages = [self._mark(message) for message in messages]

    def _mark(self, message: Message) -> dict[str, str]:
        images, text, role = "", "", message["role"]
        for part in parts_of(message):
            if part["type"] not in ("image", "text"):
                raise PromptError(f"message part of type {part['type']!r}; parts are 'image' and 'text'")
            if part["type"] == "text" and part["text"] == "":
                continue
            mark = f"\ue000{len(self.parts)}\ue001"
            self.parts.append((part, role == "assistant"))
            if part["type"] == "image" and not text:
                images += mark
            else:
                text += mark
        return {"role": role, "content": images + text, "images": images, "text": text}

    def render(self, template: str, upto: int, *, ask: bool, variables: Mapping[str, Any]) -> str:
        try:
            text: str = _compiled(template).render(
                messages=self.messages[:upto], add_generation_prompt=ask, **variables
            )
        except TemplateError as error:
            raise PromptError(
                f"the chat template cannot be rendered ({error}); mend it, or use template='plain'"
            ) from error
        return text


def prompt_spans(messages: Sequence[Message], template: str, variables: Mapping[str, Any]) -> list[Span]:
    """The spans of a prompt that asks for the next assistant turn.

    Args:
        messages: the conversation in transformers' chat format, ending with a user turn.
        template: Jinja chat template.
        variables: what the template may use besides the messages (bos_token, eos_token, ...).
    """
    marked = _Marked(messages)
    rendered = marked.render(template, len(messages), ask=True, variables=variables)
    prompts = _prompts(marked, template, variables)
    # an earlier answer is cut out as in training, or its first token could differ
    starts = [len(prompt) for prompt in prompts if _opens_answer(prompt, rendered)]
    return _cut(rendered, marked, starts, learn=False)


def training_spans(messages: Sequence[Message], template: str, variables: Mapping[str, Any]) -> list[Span]:
    """The spans of a whole conversation; each assistant turn starts exactly where its prompt at serving time ends.

    Raises:
        PromptError: no assistant turn, an empty one, or the template writes something else before an answer in training
            than when it asks for one.
    """
    marked = _Marked(messages)
    if any(message["role"] == "assistant" and not message["text"] for message in marked.messages):
        raise PromptError("the assistant's answer is empty; there is nothing to learn")
    rendered = marked.render(template, len(messages), ask=False, variables=variables)
    prompts = _prompts(marked, template, variables)
    if not prompts:
        raise PromptError("the conversation has no assistant turn; there is nothing to learn")
    for prompt in prompts:
        if not _opens_answer(prompt, rendered):
            raise PromptError(
                "the chat template writes another text before an answer when it trains than when it asks "
                f"(it asks with {prompt[-30:]!r}); give template_kwargs that make both equal, or template='plain'"
            )
    return _cut(rendered, marked, [len(prompt) for prompt in prompts], learn=True)


def _prompts(marked: _Marked, template: str, variables: Mapping[str, Any]) -> list[str]:
    """What the template writes to ask for each assistant turn."""
    answers = [i for i, message in enumerate(marked.messages) if message["role"] == "assistant"]
    return [marked.render(template, i, ask=True, variables=variables) for i in answers]


def _opens_answer(prompt: str, rendered: str) -> bool:
    """Whether the whole text goes on after this prompt with the answer, but for white space."""
    return rendered.startswith(prompt) and not _MARK.split(rendered[len(prompt) :], maxsplit=1)[0].strip()


def _check_complete(rendered: str, marked: _Marked) -> None:
    """Every part of the conversation stands in the text exactly once, and the pictures in their order."""
    found = [int(mark.group(1)) for mark in _MARK.finditer(rendered)]
    pictures = [i for i in found if i < len(marked.parts) and marked.parts[i][0]["type"] == "image"]
    if sorted(found) != list(range(len(marked.parts))) or pictures != sorted(pictures):
        raise PromptError(
            f"the chat template writes {len(found)} parts of the {len(marked.parts)} in this conversation, or in "
            "another order; it must write each text and each picture once, so use template='plain' or mend the template"
        )


def _cut(rendered: str, marked: _Marked, answer_starts: list[int], *, learn: bool) -> list[Span]:
    _check_complete(rendered, marked)
    spans: list[Span] = []
    position, learned_before = 0, False
    for mark in _MARK.finditer(rendered):
        part, is_answer = marked.parts[int(mark.group(1))]
        learned = is_answer and learn
        before = rendered[position : mark.start()]
        lead = ""
        if is_answer and (start := next((s for s in answer_starts if position <= s <= mark.start()), None)) is not None:
            before, lead = rendered[position:start], rendered[start : mark.start()]
        if before:
            spans.append(Span("template", before, ends_turn=learned_before))
        spans.append(Span("image") if part["type"] == "image" else Span("text", lead + part["text"], learned=learned))
        position, learned_before = mark.end(), learned
    if position < len(rendered):
        spans.append(Span("template", rendered[position:], ends_turn=learned_before))
    return spans
