"""CHAIR, made a score: objects that a caption names against objects that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from eyespot.data.formats.records import BadRecord
from eyespot.data.formats.rows import open_table
from eyespot.data.sample import ImageSource, Rejected, Sample
from eyespot.evaluation.benchmarks import documents
from eyespot.evaluation.benchmarks.base import Benchmark, Reference, Scored
from eyespot.evaluation.benchmarks.tables import questions_of
from eyespot.evaluation.benchmarks.vocabulary import make_vocabulary, read_synonyms
from eyespot.evaluation.scorers import chair

_LISTS = ("images", "annotations", "categories")


class Chair(Benchmark):
    """Captions of pictures whose objects are known.

    Files are rows, as JSON lines ``{"image": "x.jpg", "objects": ["dog", "bench"], "captions": ["A puppy sits."]}``,
    where captions may be left out; or COCO's instances_val2014.json, ``{"images": [{"id", "file_name"}], "annotations":
    [{"image_id", "category_id"}], "categories": [{"id", "name"}]}``. As in the paper what people's captions mention is
    there, too. A picture without any object is rejected.

    CHAIR alone is no score: an empty caption names nothing that is absent and has the best CHAIR there is, 0. So the
    score is F1 of the objects that a caption names, each once: precision is the share of them that are there, recall
    the share of those there that are named. CHAIR and coverage stand beside it.

    Source: arXiv 1809.02156, https://github.com/LisaAnne/Hallucination; on the Hub any data set with such rows.

    Args:
        path: the file, or a name on the Hub.
        image_folder: of the pictures; the folder of the file unless given.
        vocabulary: file with one object a line, "name, synonym", as the authors' synonyms.txt; else the data's names.
        captions: COCO's file of captions, beside its instances only; without it less is there than in the paper.
        prompt: what the user says beside the picture.
        split: of a data set on the Hub.
    """

    measure = "object F1"
    max_new_tokens = 64

    def __init__(
        self,
        path: str,
        image_folder: str | None = None,
        vocabulary: str | None = None,
        captions: str | None = None,
        prompt: str = "",
        split: str | None = None,
    ) -> None:
        self.path, self.image_folder, self.synonyms = path, image_folder, vocabulary
        self.captions, self.prompt, self.split = captions, prompt, split

    def read(self) -> Iterator[Sample | Rejected]:
        document = documents.find_document(self.path, _LISTS)
        if document is None:
            documents.without_effect(self.path, captions=self.captions)
            yield from questions_of(self.path, self.image_folder, self.split, self._sample)
        else:
            documents.without_effect(self.path, split=self.split)
            yield from self._published(document)

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """F1 of the objects in each caption; of all, CHAIR by mentions (i) and by captions (s), and coverage."""
        scores = chair.score(texts, [each.answers for each in references], self.vocabulary)
        samples = []
        for text, each in zip(texts, references, strict=True):
            named, there = set(self.vocabulary.mentions(text)), set(each.answers)
            samples.append(2 * len(named & there) / (len(named) + len(there)))
        return Scored(samples, {name: getattr(scores, name) for name in ("chair_i", "chair_s", "coverage")})

    @cached_property
    def vocabulary(self) -> chair.Vocabulary:
        """Of all the data, whichever questions are asked; rescoring reads it again."""
        return make_vocabulary(self._names() if self.synonyms is None else read_synonyms(self.synonyms))

    def _names(self) -> Iterator[list[str]]:
        if document := documents.find_document(self.path, _LISTS):
            yield from ([name] for name in _categories(document).values())
            return
        for _, row in open_table(self.path, ["image"], self.split).rows:
            with suppress(BadRecord):  # counted by ``read``
                yield from ([name] for name in _texts(row, "objects"))

    def _published(self, document: dict[str, Any]) -> Iterator[Sample | Rejected]:
        if self.captions is not None:
            document["annotations"] += documents.load_document(self.captions, ["annotations"])["annotations"]
        names = _categories(document)
        for picture in documents.annotated_pictures(document, self.path, self.image_folder):
            if isinstance(picture, Rejected):
                yield picture
                continue
            id, path, records = picture
            objects = [names.get(str(record.get("category_id"))) for record in records if "caption" not in record]
            said = [record["caption"] for record in records if "caption" in record]
            try:
                yield self._sample(id, {"objects": objects, "captions": said}, path, path)
            except BadRecord as bad:
                yield bad.rejected(id)

    def _sample(self, id: str, row: dict[str, Any], image: ImageSource, group: str) -> Sample:
        vocabulary, objects = self.vocabulary, _texts(row, "objects")
        try:
            there = list(map(vocabulary.name, objects))
        except ValueError as error:
            raise BadRecord("object is not in the vocabulary", str(error)) from None
        for text in _texts(row, "captions") if row.get("captions") is not None else ():
            there += vocabulary.mentions(text)
        if not there:
            raise BadRecord("nothing is there")
        return Sample.caption(id, image, list(dict.fromkeys(there)), self.prompt, group)


def _categories(document: dict[str, Any]) -> dict[str, str]:
    """Names by id, which is a text here whatever it was."""
    return {str(documents.id_in(each, "id")): str(documents.id_in(each, "name")) for each in document["categories"]}


def _texts(row: dict[str, Any] | BadRecord, column: str) -> list[str]:
    given = None if isinstance(row, BadRecord) else row.get(column)
    if not isinstance(given, list) or not all(isinstance(text, str) and any(map(str.isalnum, text)) for text in given):
        raise BadRecord(f"{column} is not a list of texts", repr(given)[:80])
    return given
