"""POPE as a benchmark: the published files, a table, and what is wrong with records."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from eyespot.evaluation.benchmarks.base import load_questions, make_benchmark
from eyespot.evaluation.runner import evaluate, rescore

ROWS = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.png", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "b.png", "text": "Is there a dog in the image?", "label": "no"},
    {"question_id": 4, "image": "b.png", "text": "Is there a cat in the image?", "label": " Yes"},
]


class Reader:
    """Knows the pictures by their name, and says it in sentences."""

    def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
        return [self.answer(images, messages[-1]["content"][-1]["text"]) for images, messages in conversations]

    def answer(self, images: Any, question: str) -> str:
        if not images:
            return "I do not know."
        there = ("dog" in question) == ("a.png" in images[0])
        return "Yes, there is." if there else "There is not."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red" if name == "a.png" else "blue").save(tmp_path / name)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_the_published_files(folder: Path) -> None:
    path = write(folder / "coco_pope_adversarial.json", ROWS)
    benchmark = make_benchmark({"benchmark": "pope", "path": path})
    samples, report = load_questions(benchmark)
    assert [sample.id for sample in samples] == ["1", "2", "3", "4"] and not report.rejected
    assert {sample.kind for sample in samples} == {"adversarial"}
    assert samples[3].answers == ("yes",) and samples[3].images == (str(folder / "b.png"),)
    assert samples[0].group == samples[1].group != samples[2].group
    result = evaluate(Reader(), samples, name="p", benchmark=benchmark)
    assert result.accuracy == 1.0 and result.benchmark == "pope"
    assert result.figures["pictures"] == {"precision": 1, "recall": 1, "f1": 1, "yes_rate": 0.5, "unparsed": 0}
    assert result.figures["blind"]["unparsed"] == 1 and result.figures["shuffled"]["f1"] == 0
    assert result.figures["always yes"]["recall"] == 1 and result.controls["always yes"].accuracy == 0.5
    assert result.by_type["adversarial"].figures["f1"] == 1
    result.write(folder / "out")
    assert rescore(folder / "out") == result


def test_answers_as_the_authors_read_them(folder: Path) -> None:
    path = write(folder / "pope.jsonl", ROWS)
    source = {"benchmark": "pope", "path": path, "published": True}
    samples, _ = load_questions(make_benchmark(source))
    result = evaluate(Reader(), samples, name="p", benchmark=make_benchmark(source))
    assert result.figures["blind"] == {"precision": 0, "recall": 0, "f1": 0, "yes_rate": 0, "unparsed": 0}


def test_tables_in_another_folder(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"question_id": r["question_id"], "image": r["image"], "question": r["text"], "answer": r["label"],
         "category": "popular"} for r in ROWS
    ]  # fmt: skip
    (tmp_path / "tables").mkdir()
    path = write(tmp_path / "tables/rows.jsonl", rows)
    samples, _ = load_questions(make_benchmark({"benchmark": "pope", "path": path, "image_folder": str(folder)}))
    assert [(s.kind, s.answers[0]) for s in samples] == [("popular", a) for a in ("yes", "no", "no", "yes")]


def test_bad_records_are_counted(folder: Path, fakes: SimpleNamespace) -> None:
    bad = [
        {**ROWS[0], "label": "maybe"},
        {**ROWS[0], "text": " "},
        {**ROWS[0], "image": "missing.png"},
        {key: value for key, value in ROWS[0].items() if key != "image"},
    ]
    path = write(folder / "pope.json", [*bad, *ROWS])
    with Path(path).open("a") as file:
        file.write("no json\n")
    samples, report = load_questions(make_benchmark({"benchmark": "pope", "path": path}))
    assert len(samples) == 4
    assert sorted(rejected.reason for rejected in report.rejected) == [
        "image file is missing", "image is not a file name", "label is neither yes nor no", "line is not JSON",
        "question is not a text",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="does not exist; check the path"):
        load_questions(make_benchmark({"benchmark": "pope", "path": str(folder / "nothing.json")}))
