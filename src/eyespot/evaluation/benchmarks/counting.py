"""How many are there? Questions of a file in the form of TallyQA, or about drawn scenes.

Source: TallyQA, arXiv 1810.12440, https://github.com/manoja328/TallyQA_dataset.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from eyespot.data.formats.records import BadRecord
from eyespot.data.sample import ImageSource, Sample
from eyespot.evaluation.benchmarks.base import Reference, Scored
from eyespot.evaluation.benchmarks.drawn import FileOrScenes
from eyespot.evaluation.benchmarks.tables import text_of

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBERS = {word: number for number, word in enumerate(_ONES)} | {
    f"{ten}-{one}".removesuffix("-zero"): 10 * tens + ones
    for tens, ten in enumerate(_TENS, 2)
    for ones, one in enumerate(_ONES[:10])
}
NUMBERS |= {"none": 0, "no": 0}
# "No, two" begins with no number, and neither does "No idea".
_NUMBER = re.compile(
    r"(?<![\w.])(?:\d+(?:,\d{3})*(?:\.\d+)?(?!\w)|no(?=\s+(?!idea|clue|way)[a-z])|(?!no\b)[a-z]+(?:-[a-z]+)?\b)"
)


class Counting(FileOrScenes):
    """The number is what counts: "2", "two" and "There are two." are the same.

    Rows are ``{"image": "VG_100K_2/2410408.jpg", "question": "How many headlights does the bus have?", "answer": 4}``,
    also as one JSON list, as the authors publish them; if they have the authors' "issimple", it is the kind of the
    question, simple or complex. Options: see ``FileOrScenes``; {question} stands for the question.
    """

    kinds = ("count",)
    slot = prompt = "{question}"

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """Accuracy of each answer; share of answers that are at most one off, and of those without a number; mean
        absolute error of all others, if there are any."""
        read = [read_number(text) for text in texts]
        errors = [
            None if number is None else abs(number - int(each.answers[0]))
            for number, each in zip(read, references, strict=True)
        ]
        known = [error for error in errors if error is not None]
        figures = {"mean_absolute_error": sum(known) / len(known)} if known else {}
        figures["within_one"] = sum(error <= 1 for error in known) / len(errors)
        figures["unparsed"] = errors.count(None) / len(errors)
        return Scored([float(error == 0) for error in errors], figures)

    def samples(self, id: str, row: dict[str, Any], image: ImageSource, group: str) -> Iterable[Sample]:
        question = self.prompt.replace(self.slot, text_of(row, "question"))
        answer = str(row.get("answer")).removesuffix(".0")
        if not answer.isdecimal():
            raise BadRecord("answer is not a whole number", repr(row.get("answer"))[:80])
        kind = {"true": "simple", "false": "complex"}.get(str(row.get("issimple")).lower(), "")
        yield Sample.question(id, image, question, answer, group=group, kind=kind)


def read_number(text: str) -> float | None:
    """The first number of a text, in digits or in words up to ninety-nine; None if there is none.

    >>> read_number("Two."), read_number("I see 1,204 ants."), read_number("There are no dogs"), read_number("many")
    (2.0, 1204.0, 0.0, None)
    """
    for found in _NUMBER.findall(text.lower()):
        if found in NUMBERS:
            return float(NUMBERS[found])
        if found[0].isdecimal():
            return float(found.replace(",", ""))
    return None
