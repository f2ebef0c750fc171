"""Questions and answers about things in a picture, in words; the same ones for drawn scenes and for photographs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight")
# The words that become plural, and the rest: "ear" and "of corn", "person" and "running".
_HEADS = (
    re.compile(r"(person|people|man|men|woman|women|face)( .*)"),
    re.compile(r"(.+?)( (?:of|with|without|in|on|from|behind|over|at|under|pointed|pointing|for|and|done|not) ?.*)"),
)
_AN = re.compile(r"^(?:hourglass|x-ray|[aeio]|u(?!ni|s|k))", re.IGNORECASE)
_NOT_AN = re.compile(r"^(?:euro|ewe|one)", re.IGNORECASE)
_IS_PLURAL = re.compile(r"(?:[^suio]s|skis|\b(?:people|men|women))$")
_IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "fish": "fish", "sheep": "sheep", "deer": "deer", "bison": "bison",
    "moose": "moose", "shrimp": "shrimp", "squid": "squid", "knife": "knives", "leaf": "leaves", "loaf": "loaves",
    "wolf": "wolves", "elf": "elves", "scarf": "scarves",
}  # fmt: skip


@dataclass(frozen=True)
class Noun:
    """A name in the forms that sentences need: "dog", "a dog", "the dog", "dogs"; `verb` is "Is" or "Are"."""

    name: str
    one: str
    the: str
    many: str
    verb: str = "Is"


@functools.cache
def english(name: str) -> Noun:
    """An English name; one that is plural already ("scissors") stays so.

    >>> english("ear of corn").one, english("ear of corn").many
    ('an ear of corn', 'ears of corn')
    >>> english("person running").many, english("scissors").one
    ('people running', 'scissors')
    """
    head, rest = next((m.groups() for pattern in _HEADS if (m := pattern.fullmatch(name))), (name, ""))
    if _IS_PLURAL.search(head):
        return Noun(name, name, f"the {name}", name, "Are")
    article = "an" if _AN.match(name) and not _NOT_AN.match(name) else "a"
    return Noun(name, f"{article} {name}", f"the {name}", plural(head) + rest)


def plural(word: str) -> str:
    """The plural of an English noun, of its last word if there are several.

    >>> plural("strawberry"), plural("pickup truck"), plural("bus"), plural("dog face")
    ('strawberries', 'pickup trucks', 'buses', 'dog faces')
    """
    before, space, last = word.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search(r"(?:s|x|z|ch|sh|tomato|potato|mosquito|volcano|tornado|buffalo)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = f"{last[:-1]}ies"
    else:
        last += "s"
    return f"{before}{space}{last}"


@functools.cache
def quoted(name: str) -> Noun:
    """A name of another language inside an English sentence, where no form of it is known but this one."""
    mark = f'"{name}"'
    return Noun(name, mark, mark, mark)


def presence_question(noun: Noun) -> str:
    return f"{noun.verb} there {noun.one} in the image?"


def count_question(noun: Noun) -> str:
    return f"How many {noun.many} are in the image?"


def where_question(noun: Noun) -> str:
    return f"Where {noun.verb.lower()} {noun.the}?"


def relation_question(first: Noun, relation: str, second: Noun) -> str:
    """relation: "left of", "right of", "above", "below" or "behind"."""
    return f"{first.verb} {first.the} {relation} {second.the}?"


def side_question(first: Noun, sides: tuple[str, str], second: Noun) -> str:
    """sides: ("left", "right") or ("above", "below")."""
    joint = " of" if sides[0] == "left" else ""
    return f"{first.verb} {first.the} {sides[0]} or {sides[1]}{joint} {second.the}?"


def list_question() -> str:
    return "What objects are in this image?"


def detect_request() -> str:
    return "Find all objects in this image."


def caption_request() -> str:
    return "Describe this image."


def listing(parts: Iterable[str]) -> str:
    """
    >>> listing(["a dog", "two cats", "a pear"])
    'a dog, two cats and a pear'
    """
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def counted(noun: Noun, number: int) -> str:
    """
    >>> counted(english("apple"), 1), counted(english("apple"), 12)
    ('an apple', '12 apples')
    """
    if number == 1 or noun.verb == "Are":
        return noun.one
    return f"{_NUMBERS[number] if number < len(_NUMBERS) else number} {noun.many}"


def statement(first: Noun, relation: str, second: Noun) -> str:
    """
    >>> statement(english("pear"), "left of", english("dog"))
    'The pear is left of the dog.'
    """
    text = f"{first.the} {first.verb.lower()} {relation} {second.the}."
    return text[0].upper() + text[1:]
