"""Grounding: boxes in pixels to text and back, expressions of RefCOCO, and drawn scenes when there is no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eyespot.data.boxes import Box
from eyespot.evaluation.benchmarks.base import load_questions, make_benchmark
from eyespot.evaluation.runner import evaluate, rescore
from eyespot.processing.images import ImageError, image_size, open_image

ROWS = [
    {"image": "a.png", "expression": "red car", "box": [0, 20, 100, 80]},
    {"image": "a.png", "expression": "the man on the left", "bbox": [100, 0, 100, 50]},
    {"image": "b.jpg", "question": "Find the dog.", "box": [10.5, 10.5, 50, 90]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn: 100 wide and 200 high for whoever looks at it
    Image.new("RGB", (200, 100), "blue").save(tmp_path / "b.jpg", exif=turned)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Told:
    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
        assert max_new_tokens == 32
        return [self.answers[messages[-1]["content"][-1]["text"]] for _, messages in conversations]


def test_boxes_in_pixels_are_asked_for_and_scored(folder: Path) -> None:
    benchmark = make_benchmark({"benchmark": "grounding", "path": write(folder / "ref.jsonl", ROWS)})
    samples, report = load_questions(benchmark)
    assert not report.rejected
    questions = ["Where is the red car?", "Where is the man on the left?", "Find the dog."]
    assert [sample.texts[0] for sample in samples] == questions
    boxes = [Box(0, 0.2, 0.5, 0.8), Box(0.5, 0, 1, 0.5), Box(0.105, 0.0525, 0.5, 0.45)]
    assert [sample.answers for sample in samples] == [(box.to_text(),) for box in boxes]
    half = Box(0.5, 0, 0.75, 0.5).to_text()
    said = dict(zip(questions, ["It is at [0, 20, 49, 79].", f"{half} or 50 00 99 49", "on the mat"], strict=True))
    result = evaluate(Told(said), samples, name="g", benchmark=benchmark, controls=())
    assert result.measure == "IoU >= 0.5"
    scores = [prediction.score for prediction in result.predictions]
    assert scores == [1, 0, 0]  # a little less than a half of the second box
    first, second = (0.97, 1), (0.48, 0.5)
    assert (first[0] + second[0]) / 3 < result.figures["pictures"]["mean_iou"] < (first[1] + second[1]) / 3
    assert result.figures["pictures"]["unparsed"] == pytest.approx(1 / 3)
    result.write(folder / "out")
    assert rescore(folder / "out") == result


def test_rows_of_the_hub_hold_several_expressions(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = {
        "question_id": ["42", "43"],
        "image": [str(folder / "a.png")] * 2,
        "question": ["Please describe the area in the box."] * 2,
        "answer": [["red car", "The car", "vehicle"], ["man"]],
        "bbox": [[0.0, 20.0, 100.0, 60.0], [100.0, 0.0, 100.0, 50.0]],
    }
    datasets.Dataset.from_dict(row).cast_column("image", datasets.Image()).save_to_disk(folder / "refcoco")
    samples, report = load_questions(make_benchmark({"benchmark": "grounding", "path": str(folder / "refcoco")}))
    assert not report.rejected
    assert [(sample.id, sample.texts[0]) for sample in samples] == [
        ("42:0", "Where is the red car?"),
        ("42:1", "Where is the car?"),
        ("42:2", "Where is the vehicle?"),
        ("43", "Where is the man?"),
    ]
    assert {sample.answers[0] for sample in samples[:3]} == {Box(0, 0.2, 0.5, 0.8).to_text()}
    assert len({sample.group for sample in samples}) == 1


def test_bad_records_are_counted(folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:20])
    box = ROWS[0]["box"]
    bad: list[dict[str, Any]] = [
        {"image": "a.png", "expression": "x"},
        {**ROWS[0], "bbox": box},
        {**ROWS[0], "box": [1, 2, 3]},
        {**ROWS[0], "box": [1, 2, 3, "4"]},
        {**ROWS[0], "box": [100, 20, 0, 80]},
        {**ROWS[0], "box": [300, 0, 400, 50]},
        {**ROWS[0], "box": [10, 10, 10.5, 50]},
        {**ROWS[0], "expression": []},
        {**ROWS[0], "expression": ["a", 3]},
        {"image": "a.png", "box": box},
        {**ROWS[0], "image": "broken.png"},
    ]
    path = write(folder / "ref.jsonl", [*bad, *ROWS])
    samples, report = load_questions(make_benchmark({"benchmark": "grounding", "path": path}))
    assert len(samples) == 3
    assert [rejected.reason for rejected in report.rejected] == [
        "record needs exactly one of 'box' and 'bbox'",
        "record needs exactly one of 'box' and 'bbox'",
        "box is not a list of four numbers",
        "box is not a list of four numbers",
        "box has no area inside the picture",
        "box has no area inside the picture",
        "box is too small to be written in hundredths of the picture",
        "no expression",
        "expression is not a text",
        "question is not a text",
        "picture cannot be opened",
    ]


def test_a_prompt_of_ones_own(folder: Path) -> None:
    source = {"benchmark": "grounding", "path": write(folder / "ref.jsonl", ROWS), "prompt": "Box of {expression}:"}
    samples, _ = load_questions(make_benchmark(source))
    assert samples[1].texts[0] == "Box of the man on the left:"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_the_size_is_that_of_the_upright_picture(tmp_path: Path, kind: str, orientation: int) -> None:
    turned = Image.Exif()
    turned[0x0112] = orientation
    path = tmp_path / f"x.{kind}"
    Image.new("RGB", (30, 20)).save(path, exif=turned)
    with Image.open(path) as opened:
        sizes = {image_size(path), image_size(path.read_bytes()), image_size(opened)}
    assert sizes == {open_image(path).size} == {(30, 20) if orientation < 5 else (20, 30)}


def test_the_size_of_a_photograph_is_read_from_its_header(tmp_path: Path) -> None:
    Image.effect_noise((400, 300), 90).save(tmp_path / "x.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:2000])
    assert image_size(tmp_path / "cut.jpg") == (400, 300)
    with pytest.raises(ImageError, match="is not a picture"):
        image_size(b"no picture at all")


def test_drawn_scenes_without_a_file() -> None:
    pytest.importorskip("emoji")
    benchmark = make_benchmark({"benchmark": "grounding", "num_scenes": 20, "objects": "shapes"})
    samples, _ = load_questions(benchmark)
    assert {sample.kind for sample in samples} == {"where"}

    class Knowing:
        def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
            truths = {(sample.images, sample.texts[0]): sample.answers[0] for sample in samples}
            return [truths[tuple(images), messages[-1]["content"][-1]["text"]] for images, messages in conversations]

    result = evaluate(Knowing(), samples, name="g", benchmark=benchmark, controls=())
    assert result.accuracy == 1.0 and result.figures["pictures"] == {"mean_iou": 1.0, "unparsed": 0.0}
