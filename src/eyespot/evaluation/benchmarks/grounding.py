"""Where is it? A thing that words point at, answered by its box.

Source: RefCOCO, https://aclanthology.org/D14-1086 and arXiv 1608.00272; on the Hub lmms-lab/RefCOCO,
lmms-lab/RefCOCOplus and lmms-lab/RefCOCOg, splits val, test, testA and testB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from eyespot.data.boxes import Box, is_box, parse_boxes, text_iou
from eyespot.data.formats.records import BadRecord
from eyespot.data.sample import ImageSource, Sample
from eyespot.evaluation.benchmarks.base import Reference, Scored
from eyespot.evaluation.benchmarks.drawn import FileOrScenes
from eyespot.evaluation.benchmarks.tables import text_of
from eyespot.evaluation.metrics import MIN_IOU
from eyespot.pictures import LazyPicture
from eyespot.processing.images import ImageError, image_size


class Grounding(FileOrScenes):
    """One question for each expression; the first box of an answer counts (see ``data.boxes.parse_boxes``).

    A row has "image", "expression" and a box in pixels of the upright picture: either "box", ``[left, top, right,
    bottom]``, or "bbox", ``[left, top, width, height]``. The expression is one text or a list of texts that mean the
    same thing. Without it "answer" is read so, because lmms-lab/RefCOCO keeps its expressions there and asks in
    "question" for a description; with neither, "question" is asked as it stands. The truth is the box as
    ``Box.to_text`` writes it, and things too small for that cannot be asked for.

    Options: see ``FileOrScenes``; {expression} stands for the expression.
    """

    measure = "IoU >= 0.5"
    max_new_tokens = 32
    kinds = ("where",)
    slot = "{expression}"
    prompt = "Where is the {expression}?"

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """Whether the IoU with the true box is 0.5 or more; mean IoU, 0 where there is no box, and share of those."""
        ious = [
            max(text_iou(text, answer) for answer in each.answers) for text, each in zip(texts, references, strict=True)
        ]
        unparsed = sum(not parse_boxes(text) for text in texts)
        figures = {"mean_iou": sum(ious) / len(ious), "unparsed": unparsed / len(texts)}
        return Scored([float(value >= MIN_IOU) for value in ious], figures)

    def samples(self, id: str, row: dict[str, Any], image: ImageSource, group: str) -> Iterable[Sample]:
        answer, asked = _box_text(row, image), self._questions(row)
        for number, text in enumerate(asked):
            own = id if len(asked) == 1 else f"{id}:{number}"
            yield Sample.question(own, image, text, answer, group=group, kind="where")

    def _questions(self, row: dict[str, Any]) -> list[str]:
        given = next((row[name] for name in ("expression", "answer") if row.get(name) is not None), None)
        if given is None:
            return [text_of(row, "question")]
        words = [text_of({"expression": one}, "expression") for one in (given if isinstance(given, list) else [given])]
        if not words:
            raise BadRecord("no expression")
        # Many expressions bring the article that the prompt has as well.
        return [re.sub(r"\b(the) the\b", r"\1", self.prompt.replace(self.slot, one), flags=re.I) for one in words]


def _box_text(row: dict[str, Any], image: ImageSource) -> str:
    corners, bbox = row.get("box"), row.get("bbox")
    if (corners is None) == (bbox is None):
        raise BadRecord("record needs exactly one of 'box' and 'bbox'")
    numbers = bbox if corners is None else corners
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_is_number, numbers)):
        raise BadRecord("box is not a list of four numbers", repr(numbers)[:80])
    left, top, third, fourth = numbers
    if corners is not None:
        third, fourth = third - left, fourth - top
    assert not isinstance(image, LazyPicture)  # rows hold files
    try:
        size = image_size(image)
    except ImageError as error:
        raise BadRecord("picture cannot be opened", str(error)) from None
    box = Box.from_coco((left, top, third, fourth), size)
    if box.area == 0:
        raise BadRecord("box has no area inside the picture", repr(numbers)[:80])
    if not is_box(text := box.to_text()):
        raise BadRecord("box is too small to be written in hundredths of the picture", repr(numbers)[:80])
    return text


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
