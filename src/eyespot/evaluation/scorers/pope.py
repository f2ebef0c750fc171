"""POPE: is there such an object in the picture, yes or no.

The three splits ask for absent objects that are drawn at random, that are frequent, or that often come with what is
there; ``columns.by_kind`` scores each.
Source: arXiv 2305.10355, https://github.com/RUCAIBox/POPE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eyespot.evaluation.scorers.columns import check_columns

_NOT = r"(?:not|n't|cannot|unable)"
_KNOW = r"(?:sure|know|tell|certain|clear|determine|say|see clearly|decide|answer)"
_UNDECIDED = re.compile(
    rf"\byes\s*(?:and|or|/)\s*no\b|\bno (?:idea|clue|way)\b|\b(?:unclear|unsure|uncertain|unknown|maybe|perhaps)\b"
    rf"|{_NOT}\s+(?:\w+\s+){{0,2}}?{_KNOW}\b",
    re.IGNORECASE,
)
_SAID = re.compile(
    r"\b(?P<yes>yes|yeah|yep)\b|\b(?:no(?! doubt)|not|nope|none|nothing|nobody|neither|cannot)\b|n't\b", re.IGNORECASE
)
_STATED = re.compile(r"\bthere(?:'s| is| are)\b", re.IGNORECASE)


@dataclass(frozen=True)
class PopeScores:
    """Shares in [0, 1]; precision, recall and F1 of saying yes, 0 where nothing can be divided.

    An unparsed answer is wrong: it is neither a yes nor a no, but a yes that was due is missed. ``samples`` is 1.0 for
    every right answer and 0.0 for others.
    """

    num_questions: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_rate: float
    unparsed: int
    samples: tuple[float, ...]


def read_yes_no(text: str) -> bool | None:
    """True for yes, False for no, None for neither, of free text, by whole words in any case.

    Like the authors' script it looks at the first sentence, where "no" or "not" is a no. Other than there
    - a sentence ends at . ! ? or a line break, and a question is passed over;
    - the first of yes and no decides: "Yes, though not a large one" is a yes;
    - contractions, "none", "nothing", "cannot" count as well: "There isn't any" is a no;
    - not knowing is no answer: "I do not know", "yes or no", "maybe";
    - what says neither yes nor no nor "there is" is no answer, where the script takes a yes.

    >>> read_yes_no("No, there is not."), read_yes_no("There is a dog."), read_yes_no("yesterday")
    (False, True, None)
    """
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text.replace("\u2019", "'").strip())
    first = next((sentence for sentence in sentences if not sentence.endswith("?")), "")
    if _UNDECIDED.search(first):
        return None
    if said := _SAID.search(first):
        return said["yes"] is not None
    return True if _STATED.search(first) else None


def read_as_published(text: str) -> bool:
    """What the authors' script reads: no if the words No, no or not stand before the first period, else yes.

    It tells nothing of an answer that is neither, and takes it for a yes; for numbers to be compared with published
    ones.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def score(
    predictions: Sequence[str], truths: Sequence[bool], *, read: Callable[[str], bool | None] = read_yes_no
) -> PopeScores:
    """Every answer read and compared; ``truths`` is True where the object is in the picture.

    Source of the measures: arXiv 2305.10355, section 4.

    Raises:
        ValueError: no question, or numbers that differ.
    """
    check_columns(predictions=predictions, truths=truths)
    said = [read(prediction) for prediction in predictions]
    right = [answer is truth for answer, truth in zip(said, map(bool, truths), strict=True)]
    found = sum(answer is True and hit for answer, hit in zip(said, right, strict=True))
    precision = _share(found, said.count(True))
    recall = _share(found, sum(map(bool, truths)))
    return PopeScores(
        num_questions=len(said),
        accuracy=sum(right) / len(right),
        precision=precision,
        recall=recall,
        f1=_share(2 * precision * recall, precision + recall),
        yes_rate=said.count(True) / len(said),
        unparsed=said.count(None),
        samples=tuple(map(float, right)),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
