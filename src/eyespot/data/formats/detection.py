"""Boxes of objects in photographs, as COCO writes them, turned into questions.

Source: https://cocodataset.org/#format-data (object detection)
"""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eyespot.data import wording
from eyespot.data.boxes import Box, named_text
from eyespot.data.formats.records import BadRecord, existing_file, image_file
from eyespot.data.sample import Rejected, Sample
from eyespot.registry import closest

MAX_COUNT = 5
MIN_SIDE = 0.03  # of the picture; what is smaller is not asked for by "where"

Absent = Literal["random", "adversarial"]


@dataclass
class Picture:
    """A picture and what is marked in it: boxes by name, and names of crowds, which nobody counted."""

    id: str
    path: str
    size: tuple[int, int]
    boxes: dict[str, list[Box]] = field(default_factory=dict)
    crowds: set[str] = field(default_factory=set)

    @property
    def names(self) -> set[str]:
        return {*self.boxes, *self.crowds}

    def number(self, name: str) -> int | None:
        """How many there are; None if there is a crowd."""
        return None if name in self.crowds else len(self.boxes.get(name, ()))


Questions = Iterator[tuple[int, str, str]]
"""(index of the picture, question, answer)"""


def read_detection(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    questions: list[str] | None = None,
    absent: Absent = "random",
    seed: int = 0,
) -> Iterator[Sample | Rejected]:
    """Questions about the objects of a COCO detection file; words alone do not tell the answers.

    - list: what objects are in this image? Each kind once, from left to right.
    - presence: is there a X? For every X as many pictures with it as without it.
    - count: how many X? For every X as many pictures with 1 as with 2, 3, 4 and 5; a X that was never marked five
      times is not counted. Pictures with a crowd of X are left out.
    - where: where is the X? Of what occurs once and is no crowd; the answer is written by `Box.to_text`.
    - detect: find all objects. Every one with its box, from left to right; pictures with a crowd are left out.

    Args:
        path: the JSON file.
        image_folder: where file names start; the folder of the JSON file unless given.
        questions: some of the five kinds; all unless given.
        absent: pictures without X are drawn at random, or ("adversarial") are those with what X is mostly seen with.
        seed: of what is drawn at random.

    Raises:
        ValueError: no such file, not COCO's form, or an unknown word.
    """
    kinds = list(KINDS) if questions is None else questions
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown question {kind!r}{closest(kind, list(KINDS))} (choices: {', '.join(KINDS)})")
    if absent not in ("random", "adversarial"):
        raise ValueError(f"absent is {absent!r}; choices: random, adversarial")
    file = existing_file(path)
    content = _content(file)
    pictures, rejected = _pictures(content, file.parent if image_folder is None else image_folder, file.stem)
    yield from rejected
    asked: defaultdict[int, list[tuple[str, str, str]]] = defaultdict(list)
    for kind in kinds:
        for index, question, answer in KINDS[kind](pictures, absent, random.Random(f"{seed}-{kind}")):
            asked[index].append((kind, question, answer))
    for index, picture in enumerate(pictures):
        for number, (kind, question, answer) in enumerate(asked[index]):
            id = f"{file.stem}:{picture.id}:{kind}:{number}"
            yield Sample.question(id, picture.path, question, answer, group=picture.path, kind=kind)


def _content(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(file)!r} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; correct it there"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"{str(file)!r} is not COCO's form; it needs the lists {', '.join(keys)}")
    return content


def _pictures(
    content: dict[str, list[Any]], folder: str | os.PathLike[str], stem: str
) -> tuple[list[Picture], list[Rejected]]:
    """The usable pictures with their boxes, and what was wrong with the other records."""
    names = _category_names(content["categories"])
    pictures: dict[int | str, Picture | None] = {}  # None: rejected
    rejected: list[Rejected] = []
    for number, record in enumerate(content["images"], 1):
        try:
            id = _image_id(record)
            pictures[id] = None
            pictures[id] = _picture(record, folder)
        except BadRecord as bad:
            rejected.append(bad.rejected(f"{stem}:image {number}"))
    for number, record in enumerate(content["annotations"], 1):
        try:
            _annotate(record, pictures, names)
        except BadRecord as bad:
            rejected.append(bad.rejected(f"{stem}:annotation {number}"))
    return [picture for picture in pictures.values() if picture is not None], rejected


def _category_names(records: list[Any]) -> dict[int, str]:
    names = {}
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("id"), int) or not record.get("name"):
            raise ValueError(
                f"category {number} has no id or name: {str(record)[:80]!r}; give a whole number and a text"
            )
        names[record["id"]] = str(record["name"])
    return names


def _image_id(record: Any) -> int | str:
    if not isinstance(record, dict) or not isinstance(record.get("id"), (int, str)):
        raise BadRecord("image has no id", repr(record)[:80])
    id: int | str = record["id"]
    return id


def _picture(record: dict[str, Any], folder: str | os.PathLike[str]) -> Picture:
    size = (record.get("width"), record.get("height"))
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise BadRecord("image has no width and height", repr(size))
    return Picture(str(record["id"]), image_file(record.get("file_name"), folder), size)  # type: ignore[arg-type]


def _annotate(record: Any, pictures: Mapping[int | str, Picture | None], names: Mapping[int, str]) -> None:
    """Add an annotation to its picture; those of a picture that was rejected are passed over."""
    if not isinstance(record, dict):
        raise BadRecord("annotation is not a JSON object", type(record).__name__)
    image = record.get("image_id")
    if not isinstance(image, (int, str)) or image not in pictures:
        raise BadRecord("annotation of an unknown image", repr(image)[:80])
    picture = pictures[image]
    if picture is None:
        return
    category = record.get("category_id")
    name = names.get(category) if isinstance(category, int) else None
    if name is None:
        raise BadRecord("annotation of an unknown category", repr(category)[:80])
    if record.get("iscrowd"):
        picture.crowds.add(name)
        return
    numbers = record.get("bbox")
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_is_number, numbers)):
        raise BadRecord("bbox is not a list of four numbers", repr(numbers)[:80])
    box = Box.from_coco(numbers, picture.size)
    if box.area == 0:
        raise BadRecord("bbox has no area inside the image", repr(numbers)[:80])
    picture.boxes.setdefault(name, []).append(box)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def ask_list(pictures: Sequence[Picture], absent: str, rng: random.Random) -> Questions:
    for index, picture in enumerate(pictures):
        places = {name: min(box.centre for box in boxes) for name, boxes in picture.boxes.items()}
        names = [*sorted(places, key=lambda name: (places[name], name)), *sorted(picture.crowds - places.keys())]
        if names:
            yield index, wording.list_question(), ", ".join(names)


def ask_presence(pictures: Sequence[Picture], absent: str, rng: random.Random) -> Questions:
    together = Counter((a, b) for picture in pictures for a in picture.names for b in picture.names if a != b)
    for name in sorted({name for picture in pictures for name in picture.names}):
        have = [index for index, picture in enumerate(pictures) if name in picture.names]
        lack = [index for index, picture in enumerate(pictures) if name not in picture.names]
        rng.shuffle(have)
        rng.shuffle(lack)
        if absent == "adversarial":
            lack.sort(key=lambda index: -sum(together[name, other] for other in pictures[index].names))
        question = wording.presence_question(wording.english(name))
        for present, without in zip(have, lack, strict=False):
            yield present, question, "yes"
            yield without, question, "no"


def ask_count(pictures: Sequence[Picture], absent: str, rng: random.Random) -> Questions:
    by_number: defaultdict[str, dict[int, list[int]]] = defaultdict(lambda: {n: [] for n in range(1, MAX_COUNT + 1)})
    for index, picture in enumerate(pictures):
        for name in picture.boxes:
            number = picture.number(name)
            if number is not None and number <= MAX_COUNT:
                by_number[name][number].append(index)
    for name, numbers in sorted(by_number.items()):
        least = min(map(len, numbers.values()))
        for number, indices in numbers.items():
            for index in rng.sample(indices, least):
                yield index, wording.count_question(wording.english(name)), str(number)


def ask_where(pictures: Sequence[Picture], absent: str, rng: random.Random) -> Questions:
    for index, picture in enumerate(pictures):
        for name, boxes in picture.boxes.items():
            box = boxes[0]
            if picture.number(name) == 1 and min(box.right - box.left, box.bottom - box.top) >= MIN_SIDE:
                yield index, wording.where_question(wording.english(name)), box.to_text()


def ask_detect(pictures: Sequence[Picture], absent: str, rng: random.Random) -> Questions:
    for index, picture in enumerate(pictures):
        objects = [(name, box) for name, boxes in picture.boxes.items() for box in boxes]
        if objects and not picture.crowds:
            objects.sort(key=lambda found: (found[1].centre, found[0]))
            yield index, wording.detect_request(), named_text(objects)


KINDS: dict[str, Callable[[Sequence[Picture], str, random.Random], Questions]] = {
    "list": ask_list,
    "presence": ask_presence,
    "count": ask_count,
    "where": ask_where,
    "detect": ask_detect,
}
