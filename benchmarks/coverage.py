"""How often intervals of 95% hold the truth, and how often the test at 5% finds a difference that is none.

Of simulated answers, whose truth is known. Pictures are taken whole, as they have to be, and every question for itself.

python benchmarks/coverage.py [FILE]
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eyespot.evaluation.metrics import cluster_bootstrap, paired_bootstrap, paired_test

NUM_SETS, NUM_DRAWS = 1000, 1000
NUM_PICTURES, ACCURACIES = (20, 50, 150), (0.6, 0.95)
GAP = 0.04
LEVEL = 0.95


class Answers(NamedTuple):
    """Scores 0 and 1, float64 [Q], of two models on the same questions; units: by name, the clusters [Q]."""

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    units: dict[str, list[int]]


def simulate(random: np.random.Generator, num_pictures: int, accuracy: float, gap: float) -> Answers:
    """Pictures with 3 to 5 questions each, some easy for both models, some for one of them.

    The chance of a right answer on a picture is the mean of two draws from beta distributions, one for both models and
    one for each. Over all pictures it is accuracy + gap / 2 for a, and accuracy - gap / 2 for b.
    """
    means = accuracy, accuracy + gap, accuracy - gap
    shared, own_a, own_b = (random.beta(mean, 1 - mean, num_pictures) for mean in means)
    pictures = np.repeat(np.arange(num_pictures), random.integers(3, 6, size=num_pictures))  # [Q]
    chances = (((shared + own) / 2)[pictures] for own in (own_a, own_b))
    a, b = ((random.random(len(pictures)) < chance).astype(np.float64) for chance in chances)
    return Answers(a, b, {"picture": pictures.tolist(), "question": list(range(len(pictures)))})


def outcomes(seed: int, num_pictures: int, accuracy: float, num_draws: int) -> dict[str, bool]:
    """Whether the intervals of a mean and of a difference hold it, and whether equal models are told apart."""
    random = np.random.default_rng(seed)
    equal = simulate(random, num_pictures, accuracy, 0.0)
    other = simulate(random, num_pictures, accuracy, GAP)
    found = {}
    for unit, clusters in equal.units.items():
        low, high = cluster_bootstrap(equal.a, clusters, num_draws, seed, LEVEL)
        found[f"mean by {unit}"] = low <= accuracy <= high
        _, low, high = paired_bootstrap(other.a, other.b, other.units[unit], num_draws, seed, LEVEL)
        found[f"difference by {unit}"] = low <= GAP <= high
        found[f"test by {unit}"] = paired_test(equal.a, equal.b, clusters, num_draws, seed) <= 0.05
    return found


def shares(num_pictures: int, accuracy: float, num_sets: int, num_draws: int) -> dict[str, float]:
    """How many of so many data sets have which outcome, in [0, 1]."""
    counts: Counter[str] = Counter()
    for seed in range(num_sets):
        counts.update(outcomes(seed, num_pictures, accuracy, num_draws))
    return {name: count / num_sets for name, count in counts.items()}


def main() -> None:
    from harness import finish  # imports torch, which the simulation does without

    rows: list[dict[str, Any]] = []
    for accuracy in ACCURACIES:
        for num_pictures in NUM_PICTURES:
            found = shares(num_pictures, accuracy, NUM_SETS, NUM_DRAWS)
            print(f"accuracy {accuracy:.2f}, {num_pictures:3} pictures: ", end="")
            print(", ".join(f"{name} {share:.1%}" for name, share in found.items()), flush=True)
            rows.append({"accuracy": accuracy, "num_pictures": num_pictures, "num_sets": NUM_SETS, **found})
    finish(rows)


if __name__ == "__main__":
    main()
