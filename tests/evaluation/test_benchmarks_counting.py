"""Counting: numbers in words and digits, TallyQA's list, and drawn scenes when there is no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eyespot.data.formats.rows import open_table
from eyespot.evaluation.benchmarks.base import load_questions, make_benchmark
from eyespot.evaluation.benchmarks.counting import NUMBERS, Counting, read_number
from eyespot.evaluation.runner import evaluate, rescore

ROWS = [
    {"image": "a.png", "question": "How many dogs?", "answer": 2, "question_id": 7, "issimple": True},
    {"image": "a.png", "question": "How many dogs that sleep?", "answer": 0, "question_id": 8, "issimple": False},
    {"image": "b.png", "question": "How many dogs?", "answer": 12, "question_id": 9, "issimple": True},
]
SAID = {
    ("a.png", "How many dogs?"): "Two.",
    ("a.png", "How many dogs that sleep?"): "There is 1 dog.",
    ("b.png", "How many dogs?"): "I cannot tell.",
}


class Reader:
    def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
        return [SAID[Path(images[0]).name, messages[-1]["content"][-1]["text"]] for images, messages in conversations]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2", 2), ("two.", 2), ("Two dogs and 3 cats.", 2), ("There are THREE dogs", 3), ("**4**", 4), ("(5)", 5),
        ("about 1,204 ants", 1204), ("3.5", 3.5), ("0", 0), ("zero", 0), ("None.", 0), ("There are no dogs.", 0),
        ("twelve", 12), ("twenty", 20), ("Ninety-nine!", 99), ("the answer is: 7", 7), ("12 or 13", 12),
        ("No, there are two", 2), ("No idea.", None), ("no", None), ("many", None), ("", None), ("someone", None),
        ("the 2nd one", 1), ("a two-headed dog", None), ("mp3", None), ("route66 has 4", 4),
    ],
)  # fmt: skip
def test_reading(text: str, number: float | None) -> None:
    assert read_number(text) == number


def test_every_number_word_once() -> None:
    words = [word for word in NUMBERS if word not in ("no", "none")]
    assert [NUMBERS[word] for word in words] == list(range(100))
    assert NUMBERS["forty-two"] == 42 and "twenty-zero" not in NUMBERS


def test_the_list_of_tallyqa(folder: Path) -> None:
    (folder / "test.json").write_text("\ufeff" + json.dumps(ROWS, indent=1), encoding="utf-8")
    benchmark = make_benchmark({"benchmark": "counting", "path": str(folder / "test.json")})
    samples, report = load_questions(benchmark)
    assert [(s.id, s.answers, s.kind) for s in samples] == [
        ("7", ("2",), "simple"), ("8", ("0",), "complex"), ("9", ("12",), "simple"),
    ]  # fmt: skip
    assert not report.rejected
    result = evaluate(Reader(), samples, name="c", benchmark=benchmark, controls=())
    assert [prediction.score for prediction in result.predictions] == [1, 0, 0]
    assert result.figures["pictures"] == {
        "mean_absolute_error": 0.5, "within_one": pytest.approx(2 / 3), "unparsed": pytest.approx(1 / 3),
    }  # fmt: skip
    assert result.by_type["complex"].figures["mean_absolute_error"] == 1
    result.write(folder / "out")
    assert rescore(folder / "out") == result


def test_without_any_number_there_is_no_mean_error() -> None:
    class One:
        answers, options, kind = ("3",), (), ""

    assert Counting().score(["many"], [One()]).figures == {"within_one": 0, "unparsed": 1}


def test_bad_records_are_counted(folder: Path) -> None:
    bad = [{**ROWS[0], "answer": answer} for answer in (-1, "two", None, 1.5, True)]
    (folder / "test.json").write_text(json.dumps([*bad, "no object", {**ROWS[1], "answer": 3.0}]))
    samples, report = load_questions(make_benchmark({"benchmark": "counting", "path": str(folder / "test.json")}))
    assert [sample.answers for sample in samples] == [("3",)]
    assert [rejected.reason for rejected in report.rejected] == [
        *["answer is not a whole number"] * 5, "record is not a JSON object",
    ]  # fmt: skip


def test_a_list_that_is_none_is_said(folder: Path) -> None:
    (folder / "test.json").write_text('[\n {"image": "a.png",}\n]')
    with pytest.raises(ValueError, match=r"test\.json' is not JSON: .* at line 2, column \d+; correct it there"):
        list(open_table(folder / "test.json", ["image"]).rows)
    (folder / "lines.json").write_text('\n{"image": "a.png"}\n')
    assert list(open_table(folder / "lines.json", ["image"]).rows) == [(2, {"image": "a.png"})]
    (folder / "lines.jsonl").write_text("[1]\n")
    assert "line is not a JSON object" in str(list(open_table(folder / "lines.jsonl", ["image"]).rows))


class Told:
    """Answers to scenes, given in advance."""

    def __init__(self, answers: dict[Any, str]) -> None:
        self.answers = answers

    def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
        return [self.answers[images[0]] for images, _ in conversations]


def test_drawn_scenes_without_a_file() -> None:
    pytest.importorskip("emoji")
    benchmark = make_benchmark({"benchmark": "counting", "num_scenes": 40, "objects": "shapes"})
    samples, _ = load_questions(benchmark)
    assert {sample.kind for sample in samples} == {"count"} and {s.answers[0] for s in samples} <= set("12345")
    words = {str(number): word for word, number in NUMBERS.items()}
    answers = {sample.images[0]: f"{words[sample.answers[0]]}." for sample in samples}
    assert evaluate(Told(answers), samples, name="c", benchmark=benchmark, controls=()).accuracy == 1.0
    more = {image: str(NUMBERS[text.removesuffix(".")] + 1) for image, text in answers.items()}
    result = evaluate(Told(more), samples, name="c", benchmark=benchmark, controls=())
    assert result.accuracy == 0.0 and result.figures["pictures"]["within_one"] == 1.0
