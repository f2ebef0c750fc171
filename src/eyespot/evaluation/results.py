"""What an evaluation found, as it is written and read again."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from eyespot.evaluation.metrics import Difference

REPORT_FILE = "report.json"
METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.jsonl"
NUM_BINS = 10


@dataclass(frozen=True)
class Score:
    """Mean score and its interval over pictures, both in [0, limit]."""

    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class TypeScore:
    """One kind of question. The last four are for yes/no questions only: shares in [0, 1] of all its questions."""

    num_questions: int
    accuracy: float
    interval: tuple[float, float]
    controls: dict[str, float]
    figures: dict[str, float]
    yes_rate: float | None = None
    neither_rate: float | None = None
    always_yes: float | None = None
    always_no: float | None = None


@dataclass(frozen=True)
class Confusion:
    """A wrong pair, normalised, and how often it came."""

    truth: str
    prediction: str
    count: int


@dataclass(frozen=True)
class Calibration:
    """Answers by how probable the model found them: mean probability, share of right ones, number, for each tenth.

    error: expected calibration error, the mean distance of the two, weighted by the number.
    Source: Guo et al., arXiv 1706.04599, equation 3.
    """

    probability: tuple[float, ...]
    accuracy: tuple[float, ...]
    number: tuple[int, ...]
    error: float

    @classmethod
    def of(cls, probabilities: Sequence[float], scores: Sequence[float]) -> Self:
        """Of answers with their probabilities and scores, both in [0, 1]; tenths without an answer are left out."""
        given, right = np.asarray(probabilities), np.asarray(scores)
        bins = np.minimum((given * NUM_BINS).astype(int), NUM_BINS - 1)
        filled = [bins == number for number in np.unique(bins)]
        rows = [(float(given[rows].mean()), float(right[rows].mean()), int(rows.sum())) for rows in filled]
        error = sum(number * abs(probability - accuracy) for probability, accuracy, number in rows) / len(given)
        probability, accuracy, number = zip(*rows, strict=True)
        return cls(probability, accuracy, number, error)


@dataclass(frozen=True)
class Prediction:
    """What was asked and answered, with all that scoring needs; a control that was not run is None.

    score, blind_score: in [0, limit]. probability: of the answer, as the model sees it; None if it does not say.
    """

    id: str
    group: str
    kind: str
    question: str
    options: tuple[str, ...]
    answers: tuple[str, ...]
    prediction: str
    score: float
    probability: float | None = None
    blind_prediction: str | None = None
    shuffled_prediction: str | None = None
    majority_prediction: str | None = None
    blind_score: float | None = None

    @property
    def correct(self) -> bool:
        """At least half a point, of measures that have one point to give."""
        return self.score >= 0.5


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate``.

    accuracy and interval are those with the right picture, of what ``measure`` names, in [0, limit]; ``controls`` and
    ``differences`` (score minus control, paired by question) are by the control's name, ``figures`` by condition and
    name. ``seconds`` is the time of all answers, controls included, and ``questions_per_second`` the distinct inputs
    asked in that time, so shared answers do not flatter it.
    """

    name: str
    benchmark: str
    measure: str
    limit: float
    num_questions: int
    num_pictures: int
    accuracy: float
    interval: tuple[float, float]
    controls: dict[str, Score]
    differences: dict[str, Difference]
    verdict: str
    figures: dict[str, dict[str, float]]
    by_type: dict[str, TypeScore]
    confusions: tuple[Confusion, ...]
    calibration: dict[str, Calibration]
    predictions: tuple[Prediction, ...]
    seconds: float
    questions_per_second: float
    settings: dict[str, Any]

    @property
    def difference(self) -> Difference | None:
        """Score minus blind score, paired, with its interval; None if the blind control was not run."""
        return self.differences.get("blind")

    @property
    def sees(self) -> bool:
        return self.verdict.startswith("sees:")

    def to_json(self) -> str:
        """Everything but the predictions, which have a file of their own, one a line."""
        report = asdict(self)
        del report["predictions"]
        report["differences"] = {name: difference._asdict() for name, difference in self.differences.items()}
        return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def metrics(self) -> dict[str, Any]:
        """The few figures that are followed from one evaluation to the next, and the most frequent wrong answers if
        there are any, as DVC shows and draws them."""
        low, high = self.interval
        controls = {name: score.accuracy for name, score in self.controls.items()}
        above = {f"above_{name}": difference.difference for name, difference in self.differences.items()}
        score = {self.measure: self.accuracy, "low": low, "high": high, "questions": self.num_questions}
        wrong = {"confusions": [asdict(confusion) for confusion in self.confusions]} if self.confusions else {}
        return {**score, **controls, **above, **wrong}

    def write(self, folder: str | Path) -> Path:
        """Write report.json, metrics.json and predictions.jsonl, each whole or not at all; returns the first's path."""
        folder = Path(folder)
        lines = [json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in self.predictions]
        write_atomically(folder / PREDICTIONS_FILE, "".join(lines))
        write_atomically(folder / METRICS_FILE, json.dumps(self.metrics(), indent=2, allow_nan=False) + "\n")
        return write_atomically(folder / REPORT_FILE, self.to_json())

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The evaluation that ``write`` put there.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are of another version of eyespot.
        """
        report = json.loads((Path(folder) / REPORT_FILE).read_text(encoding="utf-8"))
        try:
            report["predictions"] = tuple(read_predictions(folder))
            report["confusions"] = tuple(Confusion(**row) for row in report["confusions"])
            report["differences"] = {name: Difference(**row) for name, row in report["differences"].items()}
            report["controls"] = {name: Score(**_tuples(row)) for name, row in report["controls"].items()}
            report["by_type"] = {name: TypeScore(**_tuples(row)) for name, row in report["by_type"].items()}
            report["calibration"] = {name: Calibration(**_tuples(row)) for name, row in report["calibration"].items()}
            return cls(**_tuples(report))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{str(folder)!r} holds an evaluation that another version of eyespot wrote ({error}); evaluate again"
            ) from error


def read_predictions(folder: str | Path) -> list[Prediction]:
    """The predictions that ``Evaluation.write`` put there."""
    with (Path(folder) / PREDICTIONS_FILE).open(encoding="utf-8") as lines:
        return [Prediction(**_tuples(json.loads(line))) for line in lines]


def write_atomically(path: str | Path, text: str) -> Path:
    """Write UTF-8 text so that a reader finds the old file or the whole new one; folders are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; its lists become tuples again."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
