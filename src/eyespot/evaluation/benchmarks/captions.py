"""Captions beside those that people wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from eyespot.data.formats.captions import read_captions
from eyespot.data.formats.records import BadRecord
from eyespot.data.sample import Rejected, Sample
from eyespot.evaluation.benchmarks.base import Benchmark, Reference, Scored
from eyespot.evaluation.benchmarks.documents import annotated_pictures, find_document, without_effect
from eyespot.evaluation.benchmarks.tables import text_of
from eyespot.evaluation.scorers import captions, meteor


class Captions(Benchmark):
    """COCO's caption files, or a table of captions; all captions of a picture are its references.

    captions_val2014.json is ``{"images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}], "annotations":
    [{"image_id": 42, "caption": "Shoes on a rack."}, ...]}``. A table has a list of captions in each row, or, as
    Flickr8k has it, one: rows about the same picture are put together.

    METEOR is that of 2005, not the 1.5 that papers print (see ``scorers.meteor``). It needs the package
    snowballstemmer; where that is not installed this one figure is not there.

    Source: arXiv 1504.00325, https://github.com/tylin/coco-caption; on the Hub lmms-lab/COCO-Caption2017, split val,
    caption_columns [answer].

    Args:
        path: the file, the table or the name on the Hub (see ``read_captions``).
        image_folder: of the pictures; the folder of the file unless given.
        image_column: of a table. caption_columns: of a table; as ``read_captions`` finds them unless given.
        prompt: what the user says beside the picture.
        split: of a data set on the Hub.
    """

    measure = "CIDEr-D"
    limit = 10.0
    max_new_tokens = 40

    def __init__(
        self,
        path: str,
        image_folder: str | None = None,
        image_column: str | None = None,
        caption_columns: Sequence[str] | None = None,
        prompt: str = "",
        split: str | None = None,
    ) -> None:
        self.path, self.image_folder, self.prompt = path, image_folder, prompt
        self.image_column, self.caption_columns, self.split = image_column, caption_columns, split

    def read(self) -> Iterator[Sample | Rejected]:
        document = find_document(self.path, ["images", "annotations"])
        if document is None:
            column = self.image_column or "image"
            rows = read_captions(self.path, self.image_folder, column, self.caption_columns, self.prompt, self.split)
            yield from _by_picture(rows)
        else:
            unused = {"image_column": self.image_column, "caption_columns": self.caption_columns, "split": self.split}
            without_effect(self.path, **unused)
            yield from self._published(document)

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """CIDEr-D of each caption, from 0 to 10; BLEU, ROUGE-L and METEOR of all, from 0 to 1."""
        given = [each.answers for each in references]
        scores = captions.score(texts, given)
        figures = {f"BLEU-{size}": value for size, value in enumerate(scores.bleu, 1)} | {"ROUGE-L": scores.rouge_l}
        if find_spec("snowballstemmer"):
            figures["METEOR"] = meteor.score(texts, given).meteor
        # A caption that is its only reference has a cosine of 1, which floating point may exceed.
        return Scored([min(sample, self.limit) for sample in scores.cider_d_samples], figures)

    def _published(self, document: dict[str, Any]) -> Iterator[Sample | Rejected]:
        for picture in annotated_pictures(document, self.path, self.image_folder):
            if isinstance(picture, Rejected):
                yield picture
                continue
            id, path, records = picture
            texts = []
            for record in records:
                try:
                    texts.append(text_of(record, "caption"))
                except BadRecord as bad:
                    yield bad.rejected(id)
            yield Sample.caption(id, path, texts, self.prompt, path) if texts else Rejected(id, "no caption")


def _by_picture(rows: Iterator[Sample | Rejected]) -> Iterator[Sample | Rejected]:
    """One sample for each picture, with the captions of all its rows."""
    pictures: dict[str, Sample] = {}
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        first = pictures.setdefault(row.group, row)
        if first is not row:
            texts = (*first.captions, *row.captions)
            pictures[row.group] = replace(first, answers=texts, captions=texts)
    yield from pictures.values()
