"""VQAv2: open questions about photographs, each answered by ten people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eyespot.data.formats.records import BadRecord, image_file
from eyespot.data.sample import ImageSource, Rejected, Sample
from eyespot.evaluation.benchmarks.base import Benchmark, Reference, Scored
from eyespot.evaluation.benchmarks.documents import find_document, id_in, load_document, without_effect
from eyespot.evaluation.benchmarks.tables import questions_of, text_of
from eyespot.evaluation.scorers import vqa


class Vqav2(Benchmark):
    """The two files as they are published, or rows of a data set; the kind of a question is its answer_type.

    v2_OpenEnded_mscoco_val2014_questions.json is ``{"data_subtype": "val2014", "questions": [{"question_id": 42000,
    "image_id": 42, "question": "What is this?"}]}``, and v2_mscoco_val2014_annotations.json ``{"annotations":
    [{"question_id": 42000, "answer_type": "other", "answers": [{"answer": "shoes"}, ...]}]}``; the picture is
    COCO_val2014_000000000042.jpg. Annotations of other questions are passed over, so a part of the questions is enough.

    Source: arXiv 1612.00837, https://visualqa.org; on the Hub lmms-lab/VQAv2, split validation.

    Args:
        path: the questions, a file of rows with image, question, answers and answer_type, or a name on the Hub.
        annotations: the answers to the questions; for the published files only.
        image_folder: of the pictures; the folder of the file unless given.
        prefix: what stands before the twelve digits of a picture's name, for the published files only;
            "COCO_val2014_" or what data_subtype says, unless given. COCO's pictures of 2017 have none, "".
        split: of a data set on the Hub.
        prompt: said after each question, on a line of its own; LLaVA says "Answer the question using a single word or
            phrase." (arXiv 2310.03744).
        published: where all people agree compare answers as the authors' script does (see ``scorers.vqa.accuracy``).
    """

    measure = "VQA accuracy"

    def __init__(
        self,
        path: str,
        annotations: str | None = None,
        image_folder: str | None = None,
        prefix: str | None = None,
        split: str | None = None,
        prompt: str = "",
        published: bool = False,
    ) -> None:
        self.path, self.annotations, self.image_folder = path, annotations, image_folder
        self.prefix, self.split, self.prompt, self.published = prefix, split, prompt, published

    def read(self) -> Iterator[Sample | Rejected]:
        document = find_document(self.path, ["questions"])
        if document is None:
            without_effect(self.path, annotations=self.annotations, prefix=self.prefix)
            yield from questions_of(self.path, self.image_folder, self.split, self._sample)
        else:
            without_effect(self.path, split=self.split)
            yield from self._published(document)

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """Accuracy of each answer; of all the share that anybody gave, compared without any further rules."""
        scores = vqa.score(texts, [each.answers for each in references], unanimous_as_is=self.published)
        return Scored(scores.samples, {"exact_match": scores.exact_match})

    def _published(self, document: dict[str, Any]) -> Iterator[Sample | Rejected]:
        if self.annotations is None:
            raise ValueError(f"{self.path!r} has questions without answers; add annotations=FILE")
        prefix = self._prefix(document)
        folder = Path(self.path).parent if self.image_folder is None else self.image_folder
        answered: dict[int | str, dict[str, Any]] = {}
        for number, record in enumerate(load_document(self.annotations, ["annotations"])["annotations"], 1):
            try:
                answered[id_in(record, "question_id")] = record
            except BadRecord as bad:
                yield bad.rejected(f"{Path(self.annotations).stem}:{number}")
        for number, record in enumerate(document["questions"], 1):
            try:
                id = id_in(record, "question_id")
                if id not in answered:
                    raise BadRecord("question has no annotation", repr(id))
                if not isinstance(record.get("image_id"), int):
                    raise BadRecord("image_id is not a whole number", repr(record.get("image_id"))[:80])
                image = image_file(f"{prefix}{record['image_id']:012d}.jpg", folder)
                yield self._sample(str(id), {**answered[id], **record}, image, image)
            except BadRecord as bad:
                yield bad.rejected(f"{Path(self.path).stem}:{number}")

    def _prefix(self, document: dict[str, Any]) -> str:
        if self.prefix is not None:
            return self.prefix
        subtype = document.get("data_subtype")
        if subtype is None:
            raise ValueError(f"{self.path!r} has no data_subtype to name the pictures by; give prefix='COCO_val2014_'")
        return f"COCO_{subtype}_"

    def _sample(self, id: str, row: dict[str, Any], image: ImageSource, group: str) -> Sample:
        question = text_of(row, "question")
        answers = _answers(row.get("answers"))
        return Sample.question(
            id,
            image,
            f"{question}\n{self.prompt}" if self.prompt else question,
            Counter(answers).most_common(1)[0][0],
            answers=answers,
            group=group,
            kind=str(row.get("answer_type") or ""),
        )


def _answers(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given:
        raise BadRecord("answers is not a list", repr(given)[:80])
    texts: list[Any] = [each.get("answer") if isinstance(each, dict) else each for each in given]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("answer is not a text", repr(text)[:80])
    return tuple(texts)
