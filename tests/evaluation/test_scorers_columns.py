from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.evaluation.scorers import choice, pope, vqa
from eyespot.evaluation.scorers.columns import by_kind, check_columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"predictions": [], "truths": []}, "0 samples"),
        ({"predictions": ["yes"], "truths": [True, False]}, "1 predictions, 2 truths"),
        ({"predictions": "yes", "truths": [True, False, True]}, "predictions is the text 'yes'"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_columns(**columns)


def test_every_kind_is_scored_alone() -> None:
    splits = ["random", "popular", "random", "adversarial"]
    scores = by_kind(pope.score, splits, ["yes", "yes", "no", "?"], [True, False, False, True])
    assert {name: (each.num_questions, each.accuracy, each.unparsed) for name, each in scores.items()} == {
        "random": (2, 1.0, 0),
        "popular": (1, 0.0, 0),
        "adversarial": (1, 0.0, 1),
    }
    with pytest.raises(ValueError, match="3 kinds, 1 entries of column 1"):
        by_kind(pope.score, ["a", "b", "c"], ["yes"], [True])


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(["red", "a red", "blue"])), min_size=1))
def test_kinds_weighed_by_their_number_are_the_whole(rows: list[tuple[str, str]]) -> None:
    kinds, said = [kind for kind, _ in rows], [text for _, text in rows]
    answers = [["red", "red", "blue"]] * len(rows)
    parts = by_kind(vqa.score, kinds, said, answers).values()
    whole = vqa.score(said, answers)
    assert sum(part.num_questions for part in parts) == len(rows)
    assert sum(part.accuracy * part.num_questions for part in parts) == pytest.approx(whole.accuracy * len(rows))


def test_categories_of_a_scorer_equal_its_kinds() -> None:
    said, truths, options = ["A", "B", "A"], [0, 0, 0], [["x", "y"]] * 3
    categories = ["math", "math", "logic"]
    parts = by_kind(choice.score, categories, said, truths, options)
    whole = choice.score(said, truths, options, categories)
    assert whole.by_category == {name: part.accuracy for name, part in parts.items()}
