from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from eyespot.evaluation import metrics
from eyespot.evaluation.metrics import (
    cluster_bootstrap,
    exact_match,
    is_right,
    normalize_answer,
    paired_bootstrap,
    paired_test,
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


def test_p_value_by_hand() -> None:
    """Pictures a to d differ by 2, -1, 1 and 0: of 8 signs for the first three 6 sum to 2 or 4, the other 2 to 0."""
    assert paired_test([1, 1, 0, 1, 1], [0, 0, 1, 0, 1], ["a", "a", "b", "c", "d"]) == 6 / 8
    assert paired_test([1.0] * 3, [0.0] * 3, ["a", "b", "c"]) == 2 / 8
    assert paired_test([1.0] * 3, [0.0] * 3, ["a", "a", "a"]) == 1.0  # one picture tells nothing about others


def naive_p(a: list[float], b: list[float], pictures: list[int]) -> float:
    """Every way to exchange a and b on whole pictures."""
    measured, reached = abs(np.mean(a) - np.mean(b)), []
    for exchanged in product([False, True], repeat=max(pictures) + 1):
        differences = [y - x if exchanged[k] else x - y for x, y, k in zip(a, b, pictures, strict=True)]
        reached.append(abs(np.mean(differences)) >= measured - 1e-12)
    return float(np.mean(reached))


@pytest.mark.parametrize("seed", range(5))
def test_p_value_equals_a_plain_loop_over_all_ways(seed: int) -> None:
    random = np.random.default_rng(seed)
    pictures = [*range(8), *random.integers(8, size=12).tolist()]
    a, b = (random.integers(0, 4, size=20) / 3 for _ in range(2))
    expected = naive_p(a.tolist(), b.tolist(), pictures)
    assert paired_test(a, b, pictures) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_drawn_p_value_is_near_the_exact_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b, pictures = random.random(12), random.random(12), list(range(12))
    exact, drawn = (paired_test(a, b, pictures, num_draws, seed) for num_draws in (4096, 4095))
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4096))
    assert drawn != exact


def test_drawn_p_value_agrees_with_the_normal_limit_and_is_never_0() -> None:
    random = np.random.default_rng(2)
    a, b = (random.random(2000) < 0.62).astype(float), (random.random(2000) < 0.6).astype(float)
    z = abs((a - b).sum()) / math.sqrt(((a - b) ** 2).sum())
    assert paired_test(a, b, list(range(2000)), 5000) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)
    assert paired_test(np.ones(40), np.zeros(40), list(range(40)), 99) == 1 / 100


def test_p_value_is_symmetric_and_1_for_equal_scores() -> None:
    random = np.random.default_rng(4)
    a, b, pictures = random.random(60), random.random(60), np.repeat(np.arange(30), 2).tolist()
    assert paired_test(a, b, pictures, 500) == paired_test(b, a, pictures, 500) < 1
    assert paired_test(a, a, pictures) == 1.0
    assert paired_test(a, a[::-1], [0] * 30 + list(range(1, 31)), 500) == 1.0  # equal means, other questions
    assert paired_test([0.1, 0.2, 0.0], [0.0, 0.0, 0.1], ["a", "b", "c"]) == 6 / 8  # also where binary sums miss 0.2


def test_flips_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    a, b, pictures = random.random(9), random.random(9), list(range(9))
    whole = [paired_test(a, b, pictures, num_draws) for num_draws in (101, 512)]
    monkeypatch.setattr(metrics, "MAX_DRAWN_AT_ONCE", 30)
    assert [paired_test(a, b, pictures, num_draws) for num_draws in (101, 512)] == whole


@pytest.mark.parametrize(
    ("scores", "num_draws", "message"),
    [([], 100, "0 questions"), ([2.0, 0.0], 100, "limits are 0 and 1"), ([1.0, 0.0], 0, "num_draws is 0")],
)
def test_what_cannot_be_tested_is_refused(scores: list[float], num_draws: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_test(scores, scores, list(range(len(scores))), num_draws)
