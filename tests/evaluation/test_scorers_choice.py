from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.evaluation.scorers.choice import read_as_published, read_choice, score

OPTIONS = ["a red car", "a dog", "the blue car", "Two dogs"]
# answer, what is read here, what MMStar's script reads
READ = [
    ("B", "B", "B"),
    ("b", "B", "B"),
    ("(B)", "B", "B"),
    ("B.", "B", "B"),
    ("**B**", "B", None),
    ("B) a dog", "B", "B"),
    ("B: a dog", "B", "B"),
    ("B, the dog", "B", "B"),
    ("C - the blue car", "C", "C"),
    ("Option B", "B", "B"),
    ("The answer is B", "B", "B"),
    ("The answer is (b).", "B", None),
    ("answer: b\nbecause it barks", "B", "A"),
    ("**Answer:** D", "D", None),
    ("The correct option is C", "C", None),
    ("I would choose D.", "D", None),
    ("The answer is not A but B", "B", None),
    ("The answer is A. Wait, the answer is C.", "C", "A"),
    ("Option B is wrong, the answer is C", "C", "B"),
    ("I think B because the two dogs are there", "B", None),
    ("A", "A", "A"),
    ("A because it is red", "A", "A"),
    ("a dog", "B", "A"),  # an article is no letter
    ("A dog.", "B", "A"),
    ("dog", "B", "D"),
    ("two dogs", "D", None),
    ("The answer is a dog", "B", "A"),
    ("It's a red car.", "A", None),
    ("I see two dogs, no car", "D", None),
    ("Because of it", None, "B"),
    ("Dogs", None, "D"),
    ("A man walks", None, "A"),
    ("A, B and C", None, "A"),
    ("Both A and B", None, "B"),
    ("(A) or (B)", None, "A"),
    ("the blue car, not the red car", None, None),
    ("E", None, None),
    ("I", None, None),
    ("hotdog", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "expected", "published"), READ)
def test_reading(text: str, expected: str | None, published: str | None) -> None:
    for read, letter in ((read_choice, expected), (read_as_published, published)):
        number = read(text, OPTIONS)
        assert (None if number is None else "ABCD"[number]) == letter


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("It is dark red", ["red", "dark red"], 1),  # not the red within
        ("3.5", ["5", "3.5"], 1),
        ("-2", ["2", "-2"], 1),
        ("red", ["red", "Red", "blue"], None),  # options that cannot be told apart
        ("<", ["<", ">"], None),
        ("J", [str(number) for number in range(10)], 9),
        ("no", ["yes", "no"], 1),
        ("The answer: C", ["A", "B"], None),
    ],
)
def test_reading_of_other_options(text: str, options: list[str], expected: int | None) -> None:
    assert read_choice(text, options) == expected


def test_summary() -> None:
    scores = score(
        ["B", "no idea", "a cat", "(A)"],
        [1, 0, 1, 1],
        [["x", "y"], ["x", "y"], ["a dog", "a cat", "a cow", "a hen"], ["x", "y"]],
        ["math", "math", "logic", "logic"],
    )
    assert scores.samples == (1.0, 0.0, 1.0, 0.0)
    assert (scores.accuracy, scores.unparsed, scores.num_questions) == (0.5, 1, 4)
    assert scores.by_category == {"math": 0.5, "logic": 0.5}
    assert scores.chance == pytest.approx((3 * 0.5 + 0.25) / 4)
    assert score(["B"], [1], [["x", "y"]]).by_category == {}


def test_published_reading_gives_the_numbers_of_the_published_script() -> None:
    """Against B, eval/vlmeval/evaluate/mmstar.py of https://github.com/MMStar-Benchmark/MMStar counts 12 right."""
    texts = [text for text, _, _ in READ]
    scores = score(texts, [1] * len(texts), [OPTIONS] * len(texts), read=read_as_published)
    assert sum(scores.samples) == 12


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"predictions": ["A"], "truths": [2], "options": [["x", "y"]]}, "truth 2 of 2 options"),
        ({"predictions": ["A"], "truths": [-1], "options": [["x", "y"]]}, "truth -1 of 2 options"),
        ({"predictions": ["A"], "truths": [0], "options": [["x"] * 27]}, "truth 0 of 27 options"),
        ({"predictions": ["A"], "truths": [0, 1], "options": [["x", "y"]]}, "1 predictions, 2 truths"),
        ({"predictions": ["A"], "truths": [0], "options": [["x"]], "categories": []}, "0 categories"),
        ({"predictions": [], "truths": [], "options": []}, "0 samples"),
    ],
)
def test_questions_that_cannot_be_scored_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(**columns)


@settings(deadline=None)
@given(st.permutations(OPTIONS), st.sampled_from(OPTIONS))
def test_an_option_is_found_wherever_it_stands(options: list[str], option: str) -> None:
    for text in (option, option.upper(), f"It is {option}.", f"The answer is {'ABCD'[options.index(option)]}"):
        assert read_choice(text, options) == options.index(option)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([text for text, _, _ in READ]), st.integers(0, 3)), min_size=1), st.randoms())
def test_order_and_copies_change_no_measure(rows: list[tuple[str, int]], random: Random) -> None:
    mixed = sorted(rows * 2, key=lambda _: random.random())
    before, after = (
        score([text for text, _ in table], [truth for _, truth in table], [OPTIONS] * len(table))
        for table in (rows, mixed)
    )
    assert after.accuracy == pytest.approx(before.accuracy)
    assert after.unparsed == 2 * before.unparsed
