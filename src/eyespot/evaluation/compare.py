"""Two evaluations of the same questions: which model is better, by how much, and could that be chance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eyespot.evaluation.metrics import cluster_bootstrap, paired_bootstrap, paired_test
from eyespot.evaluation.results import PREDICTIONS_FILE, REPORT_FILE, Evaluation, Prediction, Score, write_atomically

COMPARISON_FILE = "comparison.json"
NUM_SHOWN = 12
LEVEL = 0.05
OUTCOMES = {(True, True): "both right", (True, False): "only A right",
            (False, True): "only B right", (False, False): "both wrong"}  # fmt: skip

Pair = tuple[Prediction, Prediction]


@dataclass(frozen=True)
class Paired:
    """Mean scores on the same questions, and B's minus A's with its 95% interval over pictures; all in [0, limit] but
    the difference, which is in [-limit, limit].

    p_value: of a difference at least as large if both were equally good (see ``paired_test``).
    outcomes: number of questions by who was right; empty where answers are not right or wrong (limit is not 1).
    """

    num_questions: int
    a: Score
    b: Score
    difference: float
    interval: tuple[float, float]
    p_value: float
    outcomes: dict[str, int]

    @property
    def better(self) -> str:
        """A, B or, if the interval reaches 0 or p is not below 0.05, nothing."""
        low, high = self.interval
        return "" if low <= 0 <= high or self.p_value >= LEVEL else "B" if low > 0 else "A"

    @property
    def p_text(self) -> str:
        return "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.2g}"

    @property
    def line(self) -> str:
        """
        >>> Paired(1000, Score(0.5, (0, 1)), Score(0.531, (0, 1)), 0.031, (0.012, 0.05), 0.002, {}).line
        'B is better: +3.1 points [1.2, 5.0], p = 0.002'
        """
        points, low, high = (100 * value for value in (self.difference, *self.interval))
        none = f"no difference that {self.num_questions:,} questions can show: {points:+.1f}"
        found = {"B": f"B is better: {points:+.1f} points", "A": f"B is worse: {points:+.1f} points"}
        return f"{found.get(self.better, none)} [{low:.1f}, {high:.1f}], {self.p_text}"


@dataclass(frozen=True)
class Differing:
    """A question whose answers have different scores."""

    id: str
    kind: str
    question: str
    answers: tuple[str, ...]
    a: str
    b: str
    score_a: float
    score_b: float


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``.

    only_in_a, only_in_b: ids of questions that the other one was not asked. differing: the first of ``num_differing``
    questions, by how much their scores differ. settings: those in which the evaluations differ, of A and of B.
    """

    a: str
    b: str
    measure: str
    limit: float
    num_pictures: int
    overall: Paired
    by_kind: dict[str, Paired]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    num_differing: int
    differing: tuple[Differing, ...]
    settings: dict[str, tuple[Any, Any]]

    def write(self, folder: str | Path) -> Path:
        """Write comparison.json, whole or not at all."""
        text = json.dumps({"line": self.overall.line, **asdict(self)}, indent=2, ensure_ascii=False, allow_nan=False)
        return write_atomically(Path(folder) / COMPARISON_FILE, text + "\n")


def compare(folder_a: str | Path, folder_b: str | Path, seed: int = 0) -> Comparison:
    """Compare what ``Evaluation.write`` wrote into two folders, on the questions that both were asked.

    Args:
        seed: of intervals and test.

    Raises:
        ValueError: a folder without evaluation, different measures, no question in common, or a question with other
            true answers in the one than in the other.
    """
    names = (str(folder_a), str(folder_b))
    a, b = (_read(Path(folder)) for folder in (folder_a, folder_b))
    if (a.measure, a.limit) != (b.measure, b.limit):
        raise ValueError(
            f"{names[0]!r} is measured by {a.measure} up to {a.limit:g} and {names[1]!r} by {b.measure} up to "
            f"{b.limit:g}; evaluate both on the same benchmark"
        )
    pairs, only_in_a, only_in_b = _paired(a.predictions, b.predictions, names)
    kinds = dict.fromkeys(row.kind for row, _ in pairs)
    differing = sorted((pair for pair in pairs if _distance(pair) > 0), key=_distance, reverse=True)
    return Comparison(
        a=names[0],
        b=names[1],
        measure=a.measure,
        limit=a.limit,
        num_pictures=len({row.group for row, _ in pairs}),
        overall=_statistics(pairs, a.limit, seed),
        by_kind={kind: _statistics([pair for pair in pairs if pair[0].kind == kind], a.limit, seed) for kind in kinds},
        only_in_a=only_in_a,
        only_in_b=only_in_b,
        num_differing=len(differing),
        differing=tuple(_differing(*pair) for pair in differing[:NUM_SHOWN]),
        settings=_other_settings(a.settings, b.settings),
    )


def _read(folder: Path) -> Evaluation:
    for name in (REPORT_FILE, PREDICTIONS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} has no {name}; give a run, or what eyespot evaluate --out wrote")
    return Evaluation.read(folder)


def _paired(
    a: Sequence[Prediction], b: Sequence[Prediction], names: tuple[str, str]
) -> tuple[list[Pair], tuple[str, ...], tuple[str, ...]]:
    """The questions that both were asked, in the order of A, and the ids that only A or only B has."""
    by_id, ids = {row.id: row for row in b}, {row.id for row in a}
    pairs = [(row, by_id[row.id]) for row in a if row.id in by_id]
    if not pairs:
        raise ValueError(f"{names[0]!r} and {names[1]!r} have 0 questions in common; evaluate both on the same data")
    other = [(row, twin) for row, twin in pairs if row.answers != twin.answers]
    if other:
        row, twin = other[0]
        raise ValueError(
            f"{len(other)} of {len(pairs)} questions have other true answers in {names[1]!r}, the first is {row.id!r} "
            f"({row.answers[0]!r} and {twin.answers[0]!r}); evaluate both on the same data"
        )
    return pairs, tuple(row.id for row in a if row.id not in by_id), tuple(row.id for row in b if row.id not in ids)


def _statistics(pairs: Sequence[Pair], limit: float, seed: int) -> Paired:
    pictures = [row.group for row, _ in pairs]
    a, b = ([pair[side].score / limit for pair in pairs] for side in (0, 1))
    difference, low, high = (limit * share for share in paired_bootstrap(b, a, pictures, seed=seed))
    counts = Counter((row.correct, twin.correct) for row, twin in pairs)
    return Paired(
        num_questions=len(pairs),
        a=_mean(a, pictures, limit, seed),
        b=_mean(b, pictures, limit, seed),
        difference=difference,
        interval=(low, high),
        p_value=paired_test(b, a, pictures, seed=seed),
        outcomes={words: counts[outcome] for outcome, words in OUTCOMES.items()} if limit == 1 else {},
    )


def _mean(shares: Sequence[float], pictures: Sequence[str], limit: float, seed: int) -> Score:
    low, high = cluster_bootstrap(shares, pictures, seed=seed)
    return Score(limit * sum(shares) / len(shares), (limit * low, limit * high))


def _distance(pair: Pair) -> float:
    return abs(pair[0].score - pair[1].score)


def _differing(row: Prediction, twin: Prediction) -> Differing:
    return Differing(
        row.id, row.kind, row.question, row.answers, row.prediction, twin.prediction, row.score, twin.score
    )


def _other_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [name for name in {**a, **b} if name not in ("date", "num_asked")]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
