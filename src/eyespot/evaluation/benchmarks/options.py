"""The options of multiple-choice questions, and which of them is right, in the forms in which rows have them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from eyespot.data.formats.records import BadRecord

# "Options: A: a dog., B: a cat", and what MMStar took over from MathVista, "Choices:\n(A) 10\n(B) 15".
_LIST = re.compile(r"\b(?:Options|Choices):\s*(?=(?:\(A\)|A[:.)]))")
_HINT = re.compile(r"\AHint:.*?\nQuestion:\s*", re.DOTALL)


def split_question(text: str) -> tuple[str, tuple[str, ...]]:
    """The question alone and its options, of one text in MMStar's form.

    >>> split_question("What is it?\\nOptions: A: a dog, small, B: a cat")
    ('What is it?', ('a dog, small', 'a cat'))

    Raises:
        BadRecord: there are not two options or more.
    """
    lists = list(_LIST.finditer(text))
    if not lists:
        raise BadRecord("question has no options", repr(text)[-80:])
    question, listed = _HINT.sub("", text[: lists[-1].start()].strip()), text[lists[-1].end() :]
    if not question:
        raise BadRecord("question is not a text", repr(text)[:80])
    length = 3 if listed.startswith("(A)") else 2
    mark = r"\s\({}\)" if length == 3 else rf"[,;\n]\s*{{}}{re.escape(listed[1])}"
    pieces = [listed[length:]]
    for number, letter in enumerate(ascii_uppercase[1:], 1):
        pieces[-1:] = re.split(mark.format(letter), pieces[-1], maxsplit=1)
        if len(pieces) == number:
            break
    return question, options_of([piece.strip() for piece in pieces])


def options_of(given: Any) -> tuple[str, ...]:
    """The texts of a list, without outer space.

    Raises:
        BadRecord: it is not a list of 2 to 26 texts.
    """
    if not isinstance(given, list) or not 2 <= len(given) <= len(ascii_uppercase):
        raise BadRecord("options are not a list of 2 to 26 texts", repr(given)[:80])
    for text in given:
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("option is not a text", repr(text)[:80])
    return tuple(text.strip() for text in given)


def right_option(answer: Any, options: Sequence[str], by_words: bool = True) -> int:
    """The place, from 0, of the option that an answer names by its place, its letter or, unless ruled out, its words.

    Raises:
        BadRecord: none, or more than one, or the same words stand in another place, too.
    """
    said = answer.strip() if isinstance(answer, str) else answer
    found = [
        place
        for place, (letter, option) in enumerate(zip(ascii_uppercase, options, strict=False))
        if said in (letter, letter.lower()) or (by_words and said == option) or (type(said) is int and said == place)
    ]
    if len(found) != 1:
        raise BadRecord("answer means two options" if found else "answer is no option", repr(answer)[:80])
    (right,) = found
    if options.count(options[right]) > 1:
        raise BadRecord("right option stands there twice", repr(options[right])[:80])
    return right
