"""POPE: is there such an object in the picture, yes or no?

Source: arXiv 2305.10355, https://github.com/RUCAIBox/POPE; on the Hub lmms-lab/POPE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eyespot.data.formats.records import BadRecord
from eyespot.data.sample import ImageSource, Rejected, Sample
from eyespot.evaluation.benchmarks.base import Benchmark, Reference, Scored
from eyespot.evaluation.benchmarks.tables import questions_of, text_of
from eyespot.evaluation.scorers import pope

SPLITS = ("random", "popular", "adversarial")


class Pope(Benchmark):
    """Files as the authors publish them, coco_pope_random.json and so on, or rows of a data set.

    Args:
        path: file(s) of JSON lines ``{"question_id": 1, "image": "x.jpg", "text": "Is there a dog in the image?",
            "label": "yes"}``, of rows with question, answer and category, or a name on the Hub.
        image_folder: of the pictures; the folder of the file unless given.
        split: of a data set on the Hub.
        published: read answers as the authors' script does (see ``scorers.pope.read_as_published``).
    """

    max_new_tokens = 16

    def __init__(
        self, path: str, image_folder: str | None = None, split: str | None = None, published: bool = False
    ) -> None:
        self.path, self.image_folder, self.split = path, image_folder, split
        self.read_answer = pope.read_as_published if published else pope.read_yes_no

    def read(self) -> Iterator[Sample | Rejected]:
        named = next((split for split in SPLITS if split in Path(self.path).stem), "")
        yield from questions_of(self.path, self.image_folder, self.split, partial(_sample, named=named))

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """Accuracy of each answer; precision, recall, F1, share of yes and of answers that say neither of all."""
        scores = pope.score(texts, [each.answers[0] == "yes" for each in references], read=self.read_answer)
        figures = {name: getattr(scores, name) for name in ("precision", "recall", "f1", "yes_rate")}
        return Scored(scores.samples, {**figures, "unparsed": scores.unparsed / scores.num_questions})


def _sample(id: str, row: dict[str, Any], image: ImageSource, group: str, *, named: str) -> Sample:
    question = text_of(row, "text", "question")
    label = text_of(row, "label", "answer").lower()
    if label not in ("yes", "no"):
        raise BadRecord("label is neither yes nor no", repr(label)[:80])
    return Sample.question(id, image, question, label, group=group, kind=str(row.get("category") or named))
