from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eyespot.data.sample import Rejected
from eyespot.evaluation.benchmarks.base import Benchmark, load_questions, make_benchmark
from eyespot.evaluation.runner import evaluate, rescore
from eyespot.evaluation.scorers import captions as scorer
from eyespot.evaluation.scorers import meteor

SAID = {
    "a.png": ["A dog runs over the grass.", "Brown dog, running on a lawn"],
    "b.png": ["Two men sit by the water.", "Men at a lake"],
    "c.png": ["A red bus in a street.", "The bus is red and stands still"],
}


def save_pictures(folder: Path) -> None:
    for name, color in zip(SAID, ("red", "green", "blue"), strict=True):
        Image.new("RGB", (8, 6), color).save(folder / name)


def write_coco(folder: Path, images: Sequence[Any] = (), annotations: Sequence[Any] = (), **options: Any) -> Benchmark:
    """The official form, with the annotations sorted by no picture, and further records."""
    save_pictures(folder)
    given = [{"id": number, "file_name": name} for number, name in enumerate(SAID)]
    own = [
        {"id": number, "image_id": number % 3, "caption": list(SAID.values())[number % 3][number // 3]}
        for number in range(6)
    ]
    path = folder / "captions_val2014.json"
    path.write_text(
        json.dumps({"info": {}, "images": [*given, *images], "annotations": [*own, *annotations]}, indent=1)
    )
    return make_benchmark({"benchmark": "captions", "path": str(path), **options})


class Fixed:
    """Says the caption of the picture's name."""

    def __init__(self, said: dict[str, str]) -> None:
        self.said = said

    def answer_batch(self, conversations: Sequence[tuple[Any, Any]], max_new_tokens: int) -> list[str]:
        return [self.said[Path(images[0]).name] if images else "A picture." for images, _ in conversations]


def test_official_files_are_read(tmp_path: Path) -> None:
    samples, report = load_questions(write_coco(tmp_path))
    assert not report.rejected
    assert [sample.id for sample in samples] == ["0", "1", "2"]
    assert [list(sample.answers) for sample in samples] == list(SAID.values())
    assert [sample.images for sample in samples] == [(str(tmp_path / name),) for name in SAID]
    assert samples[0].messages[0]["content"] == [{"type": "image"}]
    asked, _ = load_questions(write_coco(tmp_path, prompt="This image shows"))
    assert asked[0].messages[0]["content"][1] == {"type": "text", "text": "This image shows"}


def test_a_caption_a_row_becomes_one_question_for_each_picture(tmp_path: Path) -> None:
    save_pictures(tmp_path)
    rows = [f'{name},"{text}"\n' for number in range(2) for name, texts in SAID.items() for text in [texts[number]]]
    (tmp_path / "flickr8k.csv").write_text("image,caption\n" + "".join(rows) + "gone.png,A cat\n")
    samples, report = load_questions(make_benchmark({"benchmark": "captions", "path": str(tmp_path / "flickr8k.csv")}))
    assert [list(sample.answers) for sample in samples] == list(SAID.values())
    assert all(sample.captions == sample.answers for sample in samples)
    assert len({sample.id for sample in samples}) == 3
    assert [each.reason for each in report.rejected] == ["image file is missing"]


def test_columns_of_a_table(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    save_pictures(tmp_path)
    rows = [
        {"picture": {"bytes": (tmp_path / name).read_bytes(), "path": name}, "answer": texts, "question": "Describe."}
        for name, texts in SAID.items()
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "val.parquet")
    source = {"path": str(tmp_path / "val.parquet"), "image_column": "picture", "caption_columns": ["answer"]}
    samples, _ = load_questions(make_benchmark({"benchmark": "captions", **source}))
    assert [list(sample.answers) for sample in samples] == list(SAID.values())
    assert samples[0].images == ((tmp_path / "a.png").read_bytes(),)


def test_scores_are_the_scorers_and_rescoring_gives_them_again(tmp_path: Path) -> None:
    benchmark = write_coco(tmp_path)
    samples, _ = load_questions(benchmark)
    said = {"a.png": "a dog runs on a lawn", "b.png": "two men", "c.png": "a green bus in a street"}
    result = evaluate(Fixed(said), samples, name="captions", benchmark=benchmark)
    expected = scorer.score(list(said.values()), list(SAID.values()))
    assert [row.score for row in result.predictions] == pytest.approx(expected.cider_d_samples)
    assert (result.measure, result.limit) == ("CIDEr-D", 10.0)
    assert result.accuracy == pytest.approx(expected.cider_d) and 0 < result.accuracy < 10
    figures = result.figures["pictures"]
    assert [figures[f"BLEU-{size}"] for size in (1, 2, 3, 4)] == pytest.approx(expected.bleu)
    assert figures["ROUGE-L"] == pytest.approx(expected.rouge_l)
    assert ("METEOR" in figures) == (find_spec("snowballstemmer") is not None)
    assert result.controls["blind"].accuracy < result.accuracy
    assert result.controls["shuffled"].accuracy < result.accuracy
    result.write(tmp_path / "out")
    assert rescore(tmp_path / "out") == result


def test_meteor_is_among_the_figures_where_its_stemmer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = write_coco(tmp_path)
    samples, _ = load_questions(benchmark)
    texts = ["a dog", "men", "a bus"]
    module = "eyespot.evaluation.benchmarks.captions.find_spec"
    monkeypatch.setattr(module, lambda name: None)
    assert "METEOR" not in benchmark.score(texts, samples).figures
    monkeypatch.undo()
    pytest.importorskip("snowballstemmer")
    expected = meteor.score(texts, list(SAID.values())).meteor
    assert benchmark.score(texts, samples).figures["METEOR"] == pytest.approx(expected) and expected > 0


def test_the_best_caption_scores_the_limit_though_floating_point_says_more(tmp_path: Path) -> None:
    texts = [
        "cat sit two grass two",
        "sit bus by grass two men two grass grass",
        "a grass two the bus water by on",
    ]
    assert max(scorer.score(texts, [[text] for text in texts]).cider_d_samples) > 10
    save_pictures(tmp_path)
    lines = [{"image": name, "caption": text} for name, text in zip(SAID, texts, strict=True)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    benchmark = make_benchmark({"benchmark": "captions", "path": str(tmp_path / "own.jsonl")})
    samples, _ = load_questions(benchmark)
    result = evaluate(Fixed(dict(zip(SAID, texts, strict=True))), samples, name="best", benchmark=benchmark)
    assert result.accuracy == pytest.approx(10.0)
    assert evaluate(Fixed(dict.fromkeys(SAID, "")), samples, name="none", benchmark=benchmark).accuracy == 0.0


def test_broken_records_are_counted_by_their_reason(tmp_path: Path) -> None:
    images = [
        {"id": 3, "file_name": "gone.png"},
        {"id": 0, "file_name": "b.png"},
        {"file_name": "a.png"},
        {"id": 4, "file_name": "a.png"},
        {"id": 5, "file_name": None},
        7,
    ]
    annotations = [
        {"image_id": 3, "caption": "Of a picture that is not there"},
        {"image_id": 99, "caption": "Of nothing"},
        {"caption": "Of nothing"},
        {"image_id": 1, "caption": None},
        {"image_id": 1, "caption": " "},
        [],
    ]
    benchmark = write_coco(tmp_path, images, annotations)
    rejected = [(each.id, each.reason) for each in benchmark.read() if isinstance(each, Rejected)]
    stem = "captions_val2014"
    assert rejected == [
        (f"{stem}:image 4", "image file is missing"),
        (f"{stem}:image 5", "image id repeats"),
        (f"{stem}:image 6", "id is missing"),
        (f"{stem}:image 8", "image is not a file name"),
        (f"{stem}:image 9", "id is missing"),
        (f"{stem}:annotation 8", "annotation of an unknown image"),
        (f"{stem}:annotation 9", "image_id is missing"),
        (f"{stem}:annotation 12", "image_id is missing"),
        ("1", "caption is not a text"),
        ("1", "caption is not a text"),
        ("4", "no caption"),
    ]
    assert [list(sample.answers) for sample in load_questions(benchmark)[0]] == list(SAID.values())


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"images": [], "licenses": []}, {}, "has images only; give the file that has images, annotations"),
        ({"images": [], "annotations": []}, {"split": "val"}, "split='val' has no effect"),
        ({"images": [], "annotations": []}, {"caption_columns": ["answer"]}, "caption_columns=.* has no effect"),
        (None, {}, "does not exist; check the path"),
    ],
)
def test_files_that_cannot_be_read(content: object, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        list(make_benchmark({"benchmark": "captions", "path": str(path), **options}).read())
