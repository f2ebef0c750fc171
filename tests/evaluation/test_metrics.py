from __future__ import annotations

import numpy as np
import pytest

from eyespot.evaluation import metrics
from eyespot.evaluation.metrics import (
    cluster_bootstrap,
    exact_match,
    is_right,
    normalize_answer,
    paired_bootstrap,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" Yes. ", "yes"),
        ("RED!?", "red"),
        ("red .", "red"),
        ("a red circle", "a red circle"),
        ("3.5", "3.5"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_normalisation_drops_case_space_and_final_punctuation_only(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_exact_match_takes_any_accepted_answer() -> None:
    assert exact_match("Grey.", ("gray", "grey"))
    assert not exact_match("know", ("no",))
    assert not exact_match("", ("no",))


@pytest.mark.parametrize("answers", [(), "no"])
def test_answers_that_are_none_or_one_text_are_refused(answers: tuple[str, ...] | str) -> None:
    with pytest.raises(ValueError, match="at least 1 text in a tuple"):
        exact_match("n", answers)


def test_interval_covers_the_truth_where_questions_of_a_picture_agree() -> None:
    random = np.random.default_rng(0)
    covered, covered_by_question = 0, 0
    for seed in range(100):
        per_picture = random.random(60) < 0.6
        correct, clusters = np.repeat(per_picture, 8).astype(float), np.repeat(np.arange(60), 8)
        low, high = cluster_bootstrap(correct, clusters.tolist(), num_draws=300, seed=seed)
        covered += low <= 0.6 <= high
        low, high = cluster_bootstrap(correct, list(range(480)), num_draws=300, seed=seed)
        covered_by_question += low <= 0.6 <= high
    assert covered >= 88
    assert covered_by_question < 70  # the mistake that resampling pictures avoids


def test_interval_equals_a_plain_loop_over_the_same_draws() -> None:
    correct, clusters = [1.0, 0.0, 1.0, 1.0, 0.0], ["a", "a", "b", "c", "c"]
    rows = {"a": [0, 1], "b": [2], "c": [3, 4]}
    random, means = np.random.default_rng(3), []
    for _ in range(50):
        chosen = [row for number in random.integers(3, size=3) for row in rows["abc"[number]]]
        means.append(np.mean([correct[row] for row in chosen]))
    expected = np.quantile(means, [0.05, 0.95])
    np.testing.assert_allclose(cluster_bootstrap(correct, clusters, 50, seed=3, level=0.9), expected)


def test_drawing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    correct, clusters = [1.0, 0.0, 1.0, 1.0], ["a", "b", "c", "d"]
    whole = cluster_bootstrap(correct, clusters, 101)
    monkeypatch.setattr(metrics, "MAX_DRAWN_AT_ONCE", 12)
    assert cluster_bootstrap(correct, clusters, 101) == whole


def test_pairing_narrows_the_interval_and_is_antisymmetric() -> None:
    random = np.random.default_rng(1)
    hard = random.random(200) < 0.5
    better = hard | (random.random(200) < 0.1)
    clusters = list(range(200))
    difference, low, high = paired_bootstrap(better.astype(float), hard.astype(float), clusters)
    assert difference == pytest.approx(better.mean() - hard.mean())
    assert 0 < low < difference < high
    single = cluster_bootstrap(better.astype(float), clusters)
    assert high - low < single[1] - single[0]
    assert paired_bootstrap(hard.astype(float), better.astype(float), clusters).low == pytest.approx(-high)


def test_one_picture_tells_nothing_about_others() -> None:
    assert cluster_bootstrap([1.0, 1.0], ["a", "a"]) == (0.0, 1.0)
    assert paired_bootstrap([1.0, 1.0], [0.0, 0.0], ["a", "a"]) == (1.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("correct", "clusters", "options", "message"),
    [
        ([], [], {}, "0 questions"),
        ([1.0], ["a", "b"], {}, "2 clusters"),
        ([2.0, 0.0], ["a", "b"], {}, "limits are 0 and 1"),
        ([float("nan"), 0.0], ["a", "b"], {}, "limits are 0 and 1"),
        ([1.0, 0.0], ["a", "b"], {"num_draws": 0}, "num_draws is 0"),
        ([1.0, 0.0], ["a", "b"], {"level": 1.0}, "level is 1.0"),
    ],
)
def test_what_cannot_be_resampled_is_refused(
    correct: list[float], clusters: list[str], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap(correct, clusters, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("00 00 50 50", ["00 00 50 50"], True),
        ("[0, 0, 50, 33]", ["00 00 50 50"], True),  # two thirds
        ("00 00 50 24", ["00 00 50 50"], False),  # less than half
        ("60 60 99 99", ["00 00 50 50", "58 58 99 99"], True),
        ("nowhere", ["00 00 50 50"], False),
        ("Yes.", ["yes"], True),
        ("5", ["5"], True),
        ("a dog at 00 00 50 50", ["a dog at 00 00 50 50"], True),
        ("a dog at 00 00 50 49", ["a dog at 00 00 50 50"], False),  # words are compared as words
    ],
)
def test_boxes_are_right_by_what_they_cover(prediction: str, answers: list[str], right: bool) -> None:
    assert is_right(prediction, answers) is right
