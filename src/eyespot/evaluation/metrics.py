"""Exact match, and how far to trust it: bootstrap intervals that resample pictures, because questions share them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eyespot.data.boxes import is_box, text_iou

MIN_IOU = 0.5
FINAL_PUNCTUATION = ".,;:!?"
# Drawn indices held at once: 32 MiB of int64, whatever the number of pictures.
MAX_DRAWN_AT_ONCE = 4_194_304


class Difference(NamedTuple):
    """A paired difference of two accuracies, first minus second, with its interval. Fractions in [-1, 1]."""

    difference: float
    low: float
    high: float


def normalize_answer(text: str) -> str:
    """The form in which two answers are compared: no case, no surrounding space, no final punctuation.

    Nothing else is touched: articles, numbers and inner punctuation count. An answer of punctuation only stays as it
    is, so that "?" and "!" do not become the same empty answer.

    >>> normalize_answer("  Yes. ")
    'yes'
    >>> normalize_answer("A red circle!")
    'a red circle'
    >>> normalize_answer("3.5")
    '3.5'
    >>> normalize_answer("?")
    '?'
    """
    whole = text.strip().casefold()
    return whole.rstrip(FINAL_PUNCTUATION + " \t\r\n") or whole


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals one of the accepted answers, all of them normalised.

    Raises:
        ValueError: there is no accepted answer, or answers is one text instead of a sequence of texts.
    """
    if not answers or isinstance(answers, str):
        raise ValueError(f"answers is {answers!r}, at least 1 text in a tuple is needed; give ('yes',) for one answer")
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def is_right(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is an accepted answer: exactly, or, where the answers are boxes, with IoU 0.5 or more.

    >>> is_right("It is at 10 10 50 50.", ["12 10 52 50"])
    True

    Source of the limit: Everingham et al. 2010, https://doi.org/10.1007/s11263-009-0275-4, section 4.2.

    Raises:
        ValueError: as ``exact_match``.
    """
    if not isinstance(answers, str) and answers and all(map(is_box, answers)):
        return max(text_iou(prediction, answer) for answer in answers) >= MIN_IOU
    return exact_match(prediction, answers)


def cluster_bootstrap(
    correct: Sequence[float] | NDArray[np.float64],
    clusters: Sequence[Hashable],
    num_draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean of ``correct``, resampling whole clusters (pictures) with replacement.

    Questions about one picture rise and fall together, so resampling questions would give an interval too narrow.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval); Field and
    Welsh 2007, https://doi.org/10.1111/j.1467-9868.2007.00593.x (resampling clusters).

    Args:
        correct: float or bool [Q], the score of each question in [0, 1].
        clusters: [Q], the picture of each question.
        num_draws: bootstrap samples; 1000 holds the ends of a 95% interval to about a tenth of its width.
        seed: of the resampling; the same seed gives the same interval.
        level: share of the draws inside the interval.

    Returns:
        (low, high). With one cluster nothing is known about other pictures, so the interval is the whole range (0, 1).
        When every question has the same score the interval has no width; that is a limit of the method.

    Raises:
        ValueError: no question, lengths that differ, scores outside [0, 1], num_draws below 1, level not inside (0, 1).
    """
    scores = _scores(correct, clusters)
    return _interval(scores, clusters, num_draws, seed, level, whole_range=(0.0, 1.0))


def paired_bootstrap(
    correct_a: Sequence[float] | NDArray[np.float64],
    correct_b: Sequence[float] | NDArray[np.float64],
    clusters: Sequence[Hashable],
    num_draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Mean of a minus mean of b on the same questions, with its percentile interval, resampling pictures.

    Pairing matters: both scores are taken on the same drawn pictures, so what is hard for both cancels out.
    Source: as for ``cluster_bootstrap``, applied to the difference of each question.

    Args:
        correct_a: float or bool [Q], scores in [0, 1].
        correct_b: float or bool [Q], scores of the same questions in the same order.
        clusters: [Q], the picture of each question.
        num_draws: bootstrap samples.
        seed: of the resampling.
        level: share of the draws inside the interval.

    Returns:
        Difference(difference, low, high); the interval is the whole range (-1, 1) with one cluster.

    Raises:
        ValueError: as ``cluster_bootstrap``.
    """
    differences = _scores(correct_a, clusters) - _scores(correct_b, clusters)
    low, high = _interval(differences, clusters, num_draws, seed, level, whole_range=(-1.0, 1.0))
    return Difference(float(differences.mean()), low, high)


def _scores(correct: Sequence[float] | NDArray[np.float64], clusters: Sequence[Hashable]) -> NDArray[np.float64]:
    """float64 [Q], checked."""
    scores = np.asarray(correct, dtype=np.float64)
    if scores.size == 0:
        raise ValueError("there are 0 questions, at least 1 is needed; check the filter that chose the samples")
    if scores.shape != (len(clusters),):
        raise ValueError(f"scores have shape {scores.shape} but there are {len(clusters)} clusters; give one each")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores reach from {scores.min()} to {scores.max()}, the limits are 0 and 1; rescale them")
    return scores


def _interval(
    values: NDArray[np.float64],
    clusters: Sequence[Hashable],
    num_draws: int,
    seed: int,
    level: float,
    whole_range: tuple[float, float],
) -> tuple[float, float]:
    """Percentile interval of the mean of values float64 [Q] over draws of whole clusters."""
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}, the least is 1; 1000 is usual")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, it lies between 0 and 1; 0.95 is usual")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])  # int64 [Q]
    if len(numbers) == 1:
        return whole_range
    counts = np.bincount(index).astype(np.int64)  # [C]
    sums = np.bincount(index, weights=values).astype(np.float64)  # [C]
    means = _drawn_means(sums, counts, num_draws, seed)  # [R]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _drawn_means(
    sums: NDArray[np.float64], counts: NDArray[np.int64], num_draws: int, seed: int
) -> NDArray[np.float64]:
    """float64 [R]: the mean over questions in each of R draws of C clusters, from sums [C] and counts [C]."""
    random = np.random.default_rng(seed)
    num_clusters = len(sums)
    draws_at_once = max(1, MAX_DRAWN_AT_ONCE // num_clusters)
    means = []
    for start in range(0, num_draws, draws_at_once):
        size = (min(draws_at_once, num_draws - start), num_clusters)
        drawn = random.integers(num_clusters, size=size)  # [R, C]
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)
