"""Spatial reasoning: statements of VSR as questions, and drawn scenes when there is no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eyespot.evaluation.benchmarks.base import load_questions, make_benchmark
from eyespot.evaluation.benchmarks.spatial import GROUP_OF, GROUPS
from eyespot.evaluation.runner import evaluate, rescore

ROWS = [
    {"image": "a.png", "caption": "The cat is left of the dog.", "label": 1, "relation": "left of"},
    {"image": "a.png", "caption": "The cat is touching the dog.", "label": 0, "relation": "touching"},
    {"image": "b.png", "caption": "The cat is left of the dog.", "label": 0, "relation": "left of"},
    {"image": "b.png", "caption": "The cat is hugging the dog.", "label": 1, "relation": "hugging"},
]


class Reader:
    """Cats are on the left in picture a only, and hug in b; says so in sentences."""

    def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
        return [self.answer(images, messages[-1]["content"][-1]["text"]) for images, messages in conversations]

    def answer(self, images: Any, question: str) -> str:
        if not images:
            return "Who can tell?"
        true = ("left" in question) if "a.png" in images[0] else ("hugging" in question)
        return "Yes, it is." if true else "It is not."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_statements_are_asked_and_scored_by_group_of_relation(folder: Path) -> None:
    benchmark = make_benchmark({"benchmark": "spatial", "path": write(folder / "test.jsonl", ROWS)})
    samples, report = load_questions(benchmark)
    assert [sample.id for sample in samples] == ["test:1", "test:2", "test:3", "test:4"] and not report.rejected
    assert samples[0].messages[0]["content"][-1] == {
        "type": "text", "text": "The cat is left of the dog. Is this true? Answer yes or no.",
    }  # fmt: skip
    assert [sample.answers for sample in samples] == [("yes",), ("no",), ("no",), ("yes",)]
    assert [sample.kind for sample in samples] == ["projective", "topological", "projective", "hugging"]
    result = evaluate(Reader(), samples, name="s", benchmark=benchmark)
    assert result.accuracy == 1.0 and result.controls["shuffled"].accuracy == 0.25
    assert result.figures["pictures"] == {"yes_rate": 0.5, "unparsed": 0.0}
    assert result.figures["blind"] == {"yes_rate": 0.0, "unparsed": 1.0}
    assert result.controls["always yes"].accuracy == 0.5
    assert set(result.by_type) == {"projective", "topological", "hugging"}
    result.write(folder / "out")
    assert rescore(folder / "out") == result


def test_a_prompt_of_ones_own(folder: Path) -> None:
    path = write(folder / "test.jsonl", ROWS)
    source = {"benchmark": "spatial", "path": path, "prompt": 'True or false {or so}: "{caption}"'}
    samples, _ = load_questions(make_benchmark(source))
    assert samples[0].texts[0] == 'True or false {or so}: "The cat is left of the dog."'
    with pytest.raises(ValueError, match=r"prompt is 'Is it true\?'; put \{caption\} where the words of a row belong"):
        make_benchmark({**source, "prompt": "Is it true?"})


def test_every_relation_is_of_one_group() -> None:
    assert len(GROUP_OF) == sum(len(relations.split(", ")) for relations in GROUPS.values()) == 70
    assert GROUP_OF["among"] == "unallocated" and GROUP_OF["facing away from"] == "orientation"


def test_bad_records_are_counted(folder: Path) -> None:
    bad = [{**ROWS[0], "label": 2}, {**ROWS[0], "caption": ""}, {**ROWS[0], "image": "c.png"}]
    samples, report = load_questions(
        make_benchmark({"benchmark": "spatial", "path": write(folder / "test.jsonl", [*bad, *ROWS])})
    )
    assert len(samples) == 4
    assert [rejected.reason for rejected in report.rejected] == [
        "label is neither 1 nor 0", "caption is not a text", "image file is missing",
    ]  # fmt: skip


class Echo:
    """Answers to scenes, given in advance, by question."""

    def __init__(self, answers: dict[tuple[Any, str], str]) -> None:
        self.answers = answers

    def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
        return [self.answers[images[0], messages[-1]["content"][-1]["text"]] for images, messages in conversations]


def test_drawn_scenes_without_a_file(tmp_path: Path) -> None:
    pytest.importorskip("emoji")
    source = {"benchmark": "spatial", "num_scenes": 30, "image_size": 64, "objects": "shapes"}
    benchmark = make_benchmark(source)
    samples, report = load_questions(benchmark)
    assert not report.rejected and all(sample.id.startswith("scenes-test-") for sample in samples)
    assert {sample.kind for sample in samples} == {"relation", "side", "behind"}
    assert {sample.images[0].draw().size for sample in samples} == {(64, 64)}  # type: ignore[union-attr]
    said = {"yes": "Yes, it is.", "no": "It is not."}
    answers = {
        (sample.images[0], sample.texts[0]): said.get(sample.answers[0], f"{sample.answers[0]}.") for sample in samples
    }
    result = evaluate(Echo(answers), samples, name="s", benchmark=benchmark, controls=())
    assert result.accuracy == 1.0
    assert "yes_rate" not in result.by_type["side"].figures and result.by_type["behind"].figures["unparsed"] == 0
    result.write(tmp_path)
    assert rescore(tmp_path) == result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{caption}?"}, "prompt='{caption}?' has no effect without path, where scenes are drawn; drop it"),
        ({"path": "x.jsonl", "num_scenes": 5}, "num_scenes=5 has no effect beside path='x.jsonl'; drop it"),
        ({"num_scene": 5}, "has no option 'num_scene'; did you mean 'num_scenes'?"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_benchmark({"benchmark": "spatial", **options})
    assert message in str(error.value)
