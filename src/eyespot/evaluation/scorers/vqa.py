"""VQAv2: how many of ten people gave the same answer.

Source: arXiv 1505.00468, section 4 and 1612.00837; https://visualqa.org/evaluation.html;
https://github.com/GT-Vision-Lab/VQA.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eyespot.evaluation.metrics import exact_match
from eyespot.evaluation.scorers.columns import check_columns

ENOUGH = 3  # people who agree make an answer wholly right
_MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {word: str(number) for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
)} | {"none": "0"}  # fmt: skip
# Where a word would be another one without its apostrophe (she'll, we're, I'm) the official table leaves it alone.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Each with any one of its apostrophes missing, and what it stands for.
_CONTRACTIONS = {
    word[: match.start()] + word[match.end() :]: word
    for word in _CONTRACTED.split()
    for match in re.finditer("'", word)
}


@dataclass(frozen=True)
class VqaScores:
    """Means over the questions, in [0, 1], and the accuracy of each question in ``samples``.

    exact_match: share of the answers that anybody gave, compared without case and final punctuation only.
    """

    num_questions: int
    accuracy: float
    exact_match: float
    samples: tuple[float, ...]


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]], *, unanimous_as_is: bool = False) -> VqaScores:
    """``accuracy`` of every prediction, and its mean.

    Raises:
        ValueError: no question, numbers that differ, or a question without answers.
    """
    check_columns(predictions=predictions, answers=answers)
    pairs = list(zip(predictions, answers, strict=True))
    samples = tuple(accuracy(said, given, unanimous_as_is=unanimous_as_is) for said, given in pairs)
    exact = sum(exact_match(said, given) for said, given in pairs)
    return VqaScores(len(samples), sum(samples) / len(samples), exact / len(samples), samples)


def accuracy(prediction: str, answers: Sequence[str], *, unanimous_as_is: bool = False) -> float:
    """min(people who agree / 3, 1), averaged over the sets of people with one left out; in [0, 1].

    With ten answers, of which k agree, that is 0, 0.3, 0.6, 0.9 and 1 for k = 0, 1, 2, 3, and 4 or more. With three or
    two answers as many as are left after leaving one out are enough, so that full marks stay in reach; a single answer
    is not left out and must be equal.

    >>> accuracy("Two.", ["2"] * 2 + ["3"] * 8)
    0.6

    Args:
        prediction: free text; line breaks are spaces.
        answers: of all people, repeated as often as given.
        unanimous_as_is: as the official script does, and its page does not say, leave prediction and answers as they
            are where all people gave the very same text (https://github.com/GT-Vision-Lab/VQA/issues/14). "Yes." is
            then wrong for ten times "yes". For numbers to be compared with those of the script.

    Raises:
        ValueError: there are no answers, or they are one text.
    """
    if not answers or isinstance(answers, str):
        raise ValueError(f"answers is {answers!r}, at least 1 text in a list is needed; give ['yes'] for one answer")
    said, *given = (re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers))
    if not (unanimous_as_is and len(set(given)) == 1):
        said, *given = map(normalize, (said, *given))
    agree, others = given.count(said), len(given) - 1
    if not others:
        return float(agree)
    enough = min(ENOUGH, others)
    left_out = agree * min(agree - 1, enough) + (len(given) - agree) * min(agree, enough)
    return left_out / (enough * len(given))


def normalize(text: str) -> str:
    """The form in which answers are compared: no marks but ' and :, digits for number words, no articles, apostrophes.

    A mark becomes a space, or nothing if it stands beside a space anywhere in the text or if the text has a comma
    between digits; a period goes unless a digit follows.
    Source: https://visualqa.org/evaluation.html for the rules, the official script for their order and edges.

    >>> normalize("The two dogs, and 1,000 cats."), normalize("dont"), normalize("black/white"), normalize("$3.50")
    ('2 dogs and 1000 cats', "don't", 'black white', '$3.50')
    """
    joined = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in _MARKS.intersection(text):
        touches_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if joined or touches_space else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
