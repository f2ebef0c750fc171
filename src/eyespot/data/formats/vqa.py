"""Questions and answers about pictures, one JSON object a line; the simplest way to bring one's own data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from eyespot.data.formats.records import BadRecord, existing_file, image_file, json_lines, record_id
from eyespot.data.sample import Rejected, Sample


def read_vqa(
    path: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None
) -> Iterator[Sample | Rejected]:
    """Lines `{"image": name or "images": [names], "question": text, "answer": text or "answers": [texts], "id": ...}`.

    With `answers` alone, the most frequent one is learnt (of equals the first) and all are references; with both keys,
    `answer` is learnt. A line without an id is called by the file's name and its number.

    Args:
        path: the JSON lines file.
        image_folder: where relative names start; the folder of the file unless given.

    Raises:
        ValueError: the file does not exist or is not UTF-8 text.
    """
    file = existing_file(path)
    folder = file.parent if image_folder is None else image_folder
    for number, record in json_lines(file):
        id = f"{file.stem}:{number}"
        try:
            if isinstance(record, BadRecord):
                raise record
            id = record_id(record, id)
            yield _sample(id, record, folder)
        except BadRecord as bad:
            yield bad.rejected(id)


def _sample(id: str, record: dict[str, Any], folder: str | os.PathLike[str]) -> Sample:
    names = _image_names(record)
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise BadRecord("question is not a text", repr(question)[:80])
    answer, answers = _answers(record)
    images = tuple(image_file(name, folder) for name in names)
    return Sample.question(id, images, question, answer, answers=answers, group="|".join(images))


def _image_names(record: dict[str, Any]) -> list[Any]:
    if ("image" in record) == ("images" in record):
        raise BadRecord("record needs exactly one of 'image' and 'images'")
    names = record["images"] if "images" in record else [record["image"]]
    if not isinstance(names, list):
        raise BadRecord("'images' is not a list", repr(names)[:80])
    return names


def _answers(record: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    answers = record["answers"] if "answers" in record else [record.get("answer")]
    if not isinstance(answers, list) or not answers:
        raise BadRecord("'answers' is not a list of texts", repr(answers)[:80])
    answer = record["answer"] if "answer" in record else Counter(map(str, answers)).most_common(1)[0][0]
    for text in (answer, *answers):
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("answer is not a text", repr(text)[:80])
    return answer, tuple(answers)
