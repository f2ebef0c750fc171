from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.evaluation.scorers.vqa import accuracy, normalize, score

# What processPunctuation and processDigitArticle of https://github.com/GT-Vision-Lab/VQA, vqaEval.py at a013f00, give.
OFFICIAL = {
    "The two dogs": "2 dogs",
    "TEN.": "10",
    "None": "0",
    "forty two": "forty 2",
    "eleven": "eleven",
    "dont": "don't",
    "couldn'tve": "couldn't've",
    "couldntve": "couldntve",  # two apostrophes are missing
    "Im": "im",  # the table's entry has a capital, the text no longer
    "oclock": "o'clock",
    "girl's": "girl's",
    "shell": "shell",
    "its": "its",
    "1,000,000": "1000000",
    "1,000 / 2": "1000 2",
    "black/white": "black white",
    "black / white": "black white",
    "t-shirt": "t shirt",
    "well-lit room - dark": "welllit room dark",  # one mark beside a space takes the space from all of its kind
    "left,right": "left right",
    "yes, it is": "yes it is",
    "3.5": "3.5",
    "3.": "3",
    "U.S.A.": "usa",
    "10:30": "10:30",
    "$3.50!": "$3.50",
    '"stop"': "stop",
    "#1 & 2": "#1 & 2",
    "(b)": "b",
    "two\nthree": "2 3",
    "an apple a day": "apple day",
    "theatre": "theatre",
    "A an the": "",
    "": "",
}
MIXED = ["yes", "Yes.", "yes!", "a yes", "no", "no", "2", "two", "Two.", "the two"]


@pytest.mark.parametrize(("text", "normal"), OFFICIAL.items())
def test_answers_become_what_the_official_script_makes_of_them(text: str, normal: str) -> None:
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("yes", 1.0), ("YES!", 1.0), ("no", 0.6), ("a two", 1.0), ("yes and no", 0.0), ("maybe", 0.0), ("", 0.0)],
)
def test_accuracy_is_that_of_the_official_script(prediction: str, expected: float) -> None:
    assert accuracy(prediction, MIXED) == pytest.approx(expected)


@pytest.mark.parametrize(("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_people_by_how_many_agree(agree: int, expected: float) -> None:
    assert accuracy("red", ["red"] * agree + ["blue"] * (10 - agree)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["red"], 1.0), (["blue"], 0.0), (["red", "blue"], 0.5), (["red"] * 2 + ["blue"], 2 / 3), (["red"] * 3, 1.0)],
)
def test_fewer_people_can_still_give_full_marks(answers: list[str], expected: float) -> None:
    assert accuracy("red", answers) == pytest.approx(expected)


def test_unanimous_answers_are_left_alone_as_the_script_does_if_asked_to() -> None:
    assert accuracy("Yes.", ["yes"] * 10) == 1.0
    assert accuracy("Yes.", ["yes"] * 10, unanimous_as_is=True) == 0.0
    assert accuracy("yes\n", ["yes"] * 10, unanimous_as_is=True) == 1.0
    assert accuracy("Yes.", ["yes"] * 9 + ["no"], unanimous_as_is=True) == 1.0


def test_summary() -> None:
    scores = score(["two", "Red.", "a cat"], [["2"] * 10, ["red"] * 2 + ["blue"] * 8, ["dog"] * 10])
    assert scores.samples == pytest.approx((1.0, 0.6, 0.0))
    assert scores.accuracy == pytest.approx(1.6 / 3)
    assert scores.exact_match == pytest.approx(1 / 3)  # "two" is not "2" there
    assert scores.num_questions == 3


@pytest.mark.parametrize("answers", [[], "yes"])
def test_a_question_without_a_list_of_answers_is_refused(answers: list[str] | str) -> None:
    with pytest.raises(ValueError, match="at least 1 text in a list"):
        accuracy("yes", answers)


WORDS = st.sampled_from(["yes", "The two", "2", "dont", "don't", "1,000", "a", "red/blue", "red", "girl's", ""])
ANSWERS = st.lists(WORDS, min_size=1, max_size=12)


def plainly(prediction: str, answers: list[str]) -> float:
    """The definition, one left out after the other."""
    said, given = normalize(prediction), [normalize(answer) for answer in answers]
    parts = [given[:one] + given[one + 1 :] for one in range(len(given))]
    return sum(min(part.count(said) / min(3, len(part)), 1) for part in parts) / len(parts)


@settings(deadline=None)
@given(WORDS, ANSWERS.filter(lambda answers: len(answers) > 1))
def test_accuracy_equals_leaving_everybody_out_in_turn(prediction: str, answers: list[str]) -> None:
    assert accuracy(prediction, answers) == pytest.approx(plainly(prediction, answers))


@settings(deadline=None)
@given(WORDS, ANSWERS, st.randoms())
def test_neither_order_nor_case_nor_space_counts(prediction: str, answers: list[str], random: Random) -> None:
    mixed = sorted(answers, key=lambda _: random.random())
    assert accuracy(f" {prediction.upper()}\t", mixed) == accuracy(prediction, answers)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_more_agreement_is_never_less(prediction: str) -> None:
    scores = [accuracy(prediction, [prediction] * agree + ["\x00"] * (10 - agree)) for agree in range(11)]
    assert scores == sorted(scores)
    assert scores[-1] == 1.0
