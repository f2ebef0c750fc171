from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eyespot.data.sample import Rejected, Sample
from eyespot.evaluation.benchmarks.base import Benchmark, load_questions, make_benchmark
from eyespot.evaluation.runner import evaluate, question_text, rescore

QUESTIONS = [
    {"image_id": 42, "question": "What is this?", "question_id": 42000},
    {"image_id": 42, "question": "Are there shoes?", "question_id": 42001},
    {"image_id": 262148, "question": "How many men? ", "question_id": 262148000},
]
ANSWERS = {
    42000: ("other", ["shoes"] * 2 + ["Shoes."] + ["sandals"] * 7),
    42001: ("yes/no", ["yes"] * 10),
    262148000: ("number", ["2"] * 3 + ["two"] * 3 + ["3"] * 4),
}


def picture(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


def annotations() -> list[dict[str, Any]]:
    """In another order than the questions, as one may find them."""
    return [
        {
            "question_id": id,
            "question_type": "what is",
            "answer_type": kind,
            "multiple_choice_answer": texts[0],
            "answers": [
                {"answer": text, "answer_id": n, "answer_confidence": "yes"} for n, text in enumerate(texts, 1)
            ],
        }
        for id, (kind, texts) in reversed(ANSWERS.items())
    ]


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_published(folder: Path, questions: object = QUESTIONS, answers: object = None, **more: object) -> Benchmark:
    """The official files with their pictures; options of the benchmark in ``more``, and what else the file says."""
    for name, color in (("000000000042", "red"), ("000000262148", "blue")):
        (folder / f"COCO_val2014_{name}.jpg").write_bytes(picture(color))
    document = {"data_subtype": "val2014", "questions": questions}
    path = write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", document)
    given = annotations() if answers is None else answers
    answers_path = write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": given})
    return make_benchmark({"benchmark": "vqav2", "path": path, "annotations": answers_path, **more})


class Fixed:
    """Says these words to every question that begins so, and nothing where there is no picture."""

    def __init__(self, **words: str) -> None:
        self.words = words

    def answer_batch(self, conversations: Sequence[tuple[Any, Any]], max_new_tokens: int) -> list[str]:
        asked = [messages[-1]["content"][-1]["text"].split()[0] for _, messages in conversations]
        return [self.words[word] if images else "" for (images, _), word in zip(conversations, asked, strict=True)]


def rejections(benchmark: Benchmark) -> dict[str, str]:
    return {each.id: each.reason for each in benchmark.read() if isinstance(each, Rejected)}


def test_published_files_are_read_whatever_the_order_of_the_answers(tmp_path: Path) -> None:
    samples, report = load_questions(write_published(tmp_path))
    assert not report.rejected
    assert [sample.id for sample in samples] == ["42000", "42001", "262148000"]
    assert [sample.kind for sample in samples] == ["other", "yes/no", "number"]
    assert [question_text(sample) for sample in samples] == ["What is this?", "Are there shoes?", "How many men?"]
    assert samples[0].answers == tuple(ANSWERS[42000][1])  # all ten, repeated
    assert samples[0].images == (str(tmp_path / "COCO_val2014_000000000042.jpg"),)
    assert samples[0].group == samples[1].group != samples[2].group


def test_scores_are_those_of_people_who_agree_and_rescoring_gives_them_again(tmp_path: Path) -> None:
    benchmark = write_published(tmp_path)
    samples, _ = load_questions(benchmark)
    model = Fixed(What="the Shoes", Are="Yes.", How="two")
    result = evaluate(model, samples, name="vqa", benchmark=benchmark)
    # Three of ten say shoes; six say 2 or two.
    assert [row.score for row in result.predictions] == pytest.approx([0.9, 1.0, 1.0])
    assert result.accuracy == pytest.approx(2.9 / 3) and result.measure == "VQA accuracy"
    assert result.figures["pictures"] == {"exact_match": pytest.approx(2 / 3)}  # "the Shoes" was said by nobody
    assert result.controls["blind"].accuracy == 0.0 and set(result.controls) >= {"shuffled", "majority"}
    assert {kind: score.accuracy for kind, score in result.by_type.items()} == pytest.approx(
        {"yes/no": 1.0, "other": 0.9, "number": 1.0}
    )
    result.write(tmp_path / "out")
    assert rescore(tmp_path / "out") == result


def test_published_comparison_of_unanimous_answers(tmp_path: Path) -> None:
    for published, expected in ((False, 1.0), (True, 0.0)):
        benchmark = write_published(tmp_path, published=published)
        samples, _ = load_questions(benchmark)
        assert benchmark.score(["Yes."], samples[1:2]).samples[0] == expected


def test_pictures_of_another_name_and_a_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "val2017"
    folder.mkdir()
    (folder / "000000000042.jpg").write_bytes(picture("red"))
    benchmark = write_published(tmp_path, QUESTIONS[:1], prefix="", image_folder=str(folder), prompt="Be short.")
    [sample], _ = load_questions(benchmark)
    assert sample.images == (str(folder / "000000000042.jpg"),)
    assert question_text(sample) == "What is this?\nBe short."


def test_broken_records_are_counted_by_their_reason(tmp_path: Path) -> None:
    questions = [
        *QUESTIONS,
        {"image_id": 7, "question": "No such picture?", "question_id": 1},
        {"image_id": "42", "question": "Which?", "question_id": 2},
        {"image_id": 42, "question": " ", "question_id": 3},
        {"image_id": 42, "question": "Unanswered?", "question_id": 4},
        {"image_id": 42, "question": "Which?"},
        "no record",
        {"image_id": 42, "question": "Empty?", "question_id": 5},
        {"image_id": 42, "question": "Odd?", "question_id": 6},
    ]
    answers = [{"question_id": id, "answers": [{"answer": "x"}]} for id in (1, 2, 3)]
    answers += [{"question_id": 5, "answers": []}, {"question_id": 6, "answers": [{"answer": ""}]}]
    benchmark = write_published(tmp_path, questions, [*annotations(), *answers, {"answers": []}])
    stem = "v2_OpenEnded_mscoco_val2014_questions"
    assert rejections(benchmark) == {
        "v2_mscoco_val2014_annotations:9": "question_id is missing",
        f"{stem}:4": "image file is missing",
        f"{stem}:5": "image_id is not a whole number",
        f"{stem}:6": "question is not a text",
        f"{stem}:7": "question has no annotation",
        f"{stem}:8": "question_id is missing",
        f"{stem}:9": "question_id is missing",
        f"{stem}:10": "answers is not a list",
        f"{stem}:11": "answer is not a text",
    }
    assert len(load_questions(benchmark)[0]) == 3


def test_rows_of_a_table(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {**record, "image": {"bytes": picture("red" if record["image_id"] == 42 else "blue"), "path": None}}
        | {"answers": [{"answer": text, "answer_id": 1} for text in texts], "answer_type": kind}
        for record, (kind, texts) in zip(QUESTIONS, ANSWERS.values(), strict=True)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "validation.parquet")
    benchmark = make_benchmark({"benchmark": "vqav2", "path": str(tmp_path / "validation.parquet")})
    samples, report = load_questions(benchmark)
    assert not report.rejected
    assert [(sample.id, sample.kind) for sample in samples] == [
        ("42000", "other"), ("42001", "yes/no"), ("262148000", "number")
    ]  # fmt: skip
    assert samples[0].answers == tuple(ANSWERS[42000][1]) and samples[0].images == (picture("red"),)
    assert samples[0].group == samples[1].group != samples[2].group


def test_rows_with_plain_texts_as_answers(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture("red"))
    lines = [
        {"question_id": 0, "image": "x.png", "question": "Which?", "answers": ["red", "red", "blue"]},
        {"question_id": 1, "image": "x.png", "question": "Which?", "answers": "red"},
        {"question_id": 2, "image": "x.png", "answers": ["red"]},
        {"question_id": 3, "question": "Which?", "answers": ["red"]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nbroken\n")
    benchmark = make_benchmark({"benchmark": "vqav2", "path": str(tmp_path / "rows.jsonl")})
    [sample], report = load_questions(benchmark)
    assert isinstance(sample, Sample) and sample.id == "0" and sample.answers == ("red", "red", "blue")
    assert [(each.id, each.reason) for each in report.rejected] == [
        ("1", "answers is not a list"),
        ("2", "question is not a text"),
        ("3", "image is not a file name"),
        ("rows:5", "line is not JSON"),
    ]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"questions": [], "data_subtype": "val2014"}, {}, "has questions without answers; add annotations=FILE"),
        ({"questions": []}, {"annotations": "{}"}, "has no data_subtype to name the pictures by; give prefix"),
        ({"questions": []}, {"annotations": "gone.json", "prefix": ""}, "does not exist; check the path"),
        ({"questions": []}, {"annotations": "{}", "prefix": ""}, "is no JSON document with annotations"),
        ({"questions": []}, {"annotations": "{}", "split": "val"}, "split='val' has no effect"),
        ({"image": "x.png"}, {"annotations": "{}"}, "annotations=.* has no effect"),
        ({"image": "x.png"}, {"prefix": "COCO_"}, "prefix='COCO_' has no effect"),
        (None, {}, "does not exist; check the path"),
        ("not a record", {}, None),
    ],
)
def test_files_that_cannot_be_read(
    content: object, options: dict[str, str], message: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "questions.json"
    if content is not None:
        write(path, content)
    if options.get("annotations") == "{}":
        options = {**options, "annotations": write(tmp_path / "annotations.json", {})}
    benchmark = make_benchmark({"benchmark": "vqav2", "path": str(path), **options})
    if message is None:
        assert list(rejections(benchmark).values()) == ["line is not a JSON object"]
        return
    with pytest.raises(ValueError, match=message):
        list(benchmark.read())


@pytest.mark.parametrize(
    ("text", "message"),
    [(b'{"questions": [', "is not JSON: .* at line 1, column"), (b'{"questions": "\xff"}', "is not UTF-8 text")],
)
def test_broken_files(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "questions.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        list(make_benchmark({"benchmark": "vqav2", "path": str(tmp_path / "questions.json")}).read())
