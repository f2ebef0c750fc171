"""Does a model look at the picture? The check that a Space must pass before it may be pushed.

    python -m eyespot.export.sensitivity MODEL QUESTIONS

runs it in a process of its own, with whatever eyespot that process finds, and prints what was found as JSON.
QUESTIONS is a folder that ``write_questions`` filled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import eyespot
from eyespot.data.sample import Sample
from eyespot.evaluation.controls import shuffled
from eyespot.evaluation.metrics import paired_bootstrap
from eyespot.inference import Assistant, load
from eyespot.processing.images import open_image

QUESTIONS_FILE = "questions.json"
MIN_PICTURES = 8  # an interval from fewer says nothing
MAX_NEW_TOKENS = 16
ROUNDING = 1e-4  # of float32 log-probabilities, when the same is computed in another company


class NotSensitive(ValueError):
    """A model whose answers do not come from the picture."""


@dataclass(frozen=True)
class Sensitivity:
    """What the same questions get beside their own pictures and beside others'.

    changed: answers that are another text. likelier, less_likely: questions whose true answer is, beside its own
    picture. low, high: 95% interval, over pictures, of the share of the one minus that of the other. code: the folder
    of the eyespot that was asked.
    """

    questions: int
    changed: int
    likelier: int
    less_likely: int
    low: float
    high: float
    code: str

    def __str__(self) -> str:
        return (
            f"of {self.questions} answers {self.changed} are others beside another picture, and the true one is "
            f"likelier beside its own {self.likelier} times, less likely {self.less_likely} times (difference of the "
            f"shares {self.low:.2f} to {self.high:.2f})"
        )

    def check(self) -> None:
        """Raise NotSensitive unless answers change with the picture, and for the better."""
        if self.changed == 0 or self.low <= 0:
            raise NotSensitive(
                f"the model does not look at pictures: {self}; an answer has to change and the interval to lie above "
                "0, so train it until its evaluation says that it sees"
            )


def measure(assistant: Assistant, samples: Sequence[Sample]) -> Sensitivity:
    """Ask every question twice, beside its own picture and beside that of another sample.

    Raises:
        ValueError: too few different pictures.
    """
    groups = [sample.group for sample in samples]
    if len(set(groups)) < MIN_PICTURES:
        raise ValueError(f"the questions are about {len(set(groups))} pictures, {MIN_PICTURES} are needed; give more")
    others = shuffled(samples, seed=0)
    texts = zip(_answers(assistant, samples), _answers(assistant, others), strict=True)
    own, other = (np.array(_log_probs(assistant, side)) for side in (samples, others))
    better, worse = own - other > ROUNDING, other - own > ROUNDING
    _, low, high = paired_bootstrap(better, worse, groups)
    return Sensitivity(
        len(samples), sum(a != b for a, b in texts), int(better.sum()), int(worse.sum()), low, high,
        str(Path(eyespot.__file__).parent),
    )  # fmt: skip


def _answers(assistant: Assistant, samples: Sequence[Sample]) -> list[str]:
    return assistant.answer_batch([(s.images, s.messages[:-1]) for s in samples], MAX_NEW_TOKENS)


def _log_probs(assistant: Assistant, samples: Sequence[Sample]) -> list[float]:
    """Of the true answers."""
    return [score.log_prob for score in assistant.score_answers([(s.images, s.messages) for s in samples])]


def write_questions(samples: Sequence[Sample], folder: Path) -> None:
    """Questions about one picture each, as PNG files and JSON, for a process that has not the data."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number, sample in enumerate(samples):
        open_image(sample.images[0]).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "messages": sample.messages, "group": sample.group})
    (folder / QUESTIONS_FILE).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def read_questions(folder: Path) -> list[Sample]:
    """What ``write_questions`` wrote."""
    rows = json.loads((folder / QUESTIONS_FILE).read_text("utf-8"))
    return [
        Sample(row["image"], (str(folder / row["image"]),), tuple(row["messages"]), group=row["group"]) for row in rows
    ]


def main(model: str, questions: str) -> None:
    """Print what was found, as one line of JSON."""
    print(json.dumps(asdict(measure(load(model, "cpu", "float32"), read_questions(Path(questions))))))


if __name__ == "__main__":
    main(*sys.argv[1:])
