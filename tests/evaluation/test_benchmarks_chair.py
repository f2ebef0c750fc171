from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eyespot.data.sample import Rejected
from eyespot.evaluation.benchmarks.base import Benchmark, load_questions, make_benchmark
from eyespot.evaluation.benchmarks.vocabulary import make_vocabulary, read_synonyms
from eyespot.evaluation.runner import evaluate, rescore

OBJECTS = {"a.png": ["dog", "bench", "dog"], "b.png": ["person", "elephant"], "c.png": ["hot dog"]}
# As the authors' list: words that repeat, and two spaces.
SYNONYMS = """person, man, woman, baby, man
bench, pew
dog, puppy,  mutt

elephant
hot dog
train, locomotive
"""
SAID = {
    "a.png": "Two puppies and a man on a bench with a dog.",  # dog, person, dog's bench
    "b.png": "A baby elephant.",
    "c.png": "Food.",
}


def save_pictures(folder: Path) -> None:
    for name, color in zip(OBJECTS, ("red", "green", "blue"), strict=True):
        Image.new("RGB", (8, 6), color).save(folder / name)


def write_lines(folder: Path, more: Sequence[Any] = (), **options: Any) -> Benchmark:
    save_pictures(folder)
    lines = [{"image": name, "objects": objects} for name, objects in OBJECTS.items()]
    (folder / "objects.jsonl").write_text("\n".join(map(json.dumps, [*lines, *more])))
    return make_benchmark({"benchmark": "chair", "path": str(folder / "objects.jsonl"), **options})


def write_coco(folder: Path, more: Sequence[Any] = (), **options: Any) -> Benchmark:
    """Instances as COCO has them; some category numbers are not used, and one category is in no picture."""
    save_pictures(folder)
    categories = {"person": 1, "bench": 15, "dog": 18, "elephant": 22, "hot dog": 58, "train": 7}
    annotations = [
        {"image_id": number, "category_id": categories[name], "bbox": [0, 0, 1, 1], "iscrowd": 0}
        for number, objects in enumerate(OBJECTS.values())
        for name in objects
    ]
    document = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(OBJECTS)],
        "annotations": [*annotations, *more],
        "categories": [{"id": id, "name": name} for name, id in categories.items()],
    }
    (folder / "instances_val2014.json").write_text(json.dumps(document))
    return make_benchmark({"benchmark": "chair", "path": str(folder / "instances_val2014.json"), **options})


def write_synonyms(folder: Path, text: str = SYNONYMS) -> str:
    (folder / "synonyms.txt").write_text(text)
    return str(folder / "synonyms.txt")


class Fixed:
    """Says the caption of the picture's name."""

    def __init__(self, said: dict[str, str]) -> None:
        self.said = said

    def answer_batch(self, conversations: Sequence[tuple[Any, Any]], max_new_tokens: int) -> list[str]:
        return [self.said[Path(images[0]).name] if images else "A man." for images, _ in conversations]


@pytest.mark.parametrize("write", [write_lines, write_coco])
def test_both_forms_are_read(write: Any, tmp_path: Path) -> None:
    samples, report = load_questions(write(tmp_path, prompt="Describe it."))
    assert not report.rejected
    assert [sample.answers for sample in samples] == [("dog", "bench"), ("person", "elephant"), ("hot dog",)]
    assert [sample.images for sample in samples] == [(str(tmp_path / name),) for name in OBJECTS]
    assert samples[0].messages[0]["content"][1] == {"type": "text", "text": "Describe it."}


@pytest.mark.parametrize("write", [write_lines, write_coco])
def test_scores_by_hand_and_rescoring_gives_them_again(write: Any, tmp_path: Path) -> None:
    benchmark = write(tmp_path, vocabulary=write_synonyms(tmp_path))
    samples, _ = load_questions(benchmark)
    result = evaluate(Fixed(SAID), samples, name="chair", benchmark=benchmark)
    # Named: dog, person, bench (of dog, bench); elephant (of person, elephant), which is no person; nothing (of 1).
    assert [row.score for row in result.predictions] == pytest.approx([4 / 5, 2 / 3, 0.0])
    assert result.measure == "object F1"
    # Of five mentions, dog twice, one is not there; it is in one caption of three.
    assert result.figures["pictures"] == pytest.approx({"chair_i": 1 / 5, "chair_s": 1 / 3, "coverage": 3 / 5})
    assert result.controls["blind"].accuracy == pytest.approx((0 + 2 / 3 + 0) / 3)
    assert {"shuffled", "majority"} <= set(result.controls)
    result.write(tmp_path / "out")
    assert rescore(tmp_path / "out") == result


def test_saying_nothing_has_the_best_chair_and_the_worst_score(tmp_path: Path) -> None:
    benchmark = write_lines(tmp_path)
    samples, _ = load_questions(benchmark)
    scored = benchmark.score([""] * 3, samples)
    assert scored.figures == {"chair_i": 0.0, "chair_s": 0.0, "coverage": 0.0}
    assert list(scored.samples) == [0.0] * 3
    everything = benchmark.score(["Dogs, benches, people, elephants and hot dogs"] * 3, samples)
    assert list(everything.samples) == pytest.approx([4 / 7, 4 / 7, 2 / 6])
    assert everything.figures["coverage"] == 1.0 and everything.figures["chair_s"] == 1.0


@pytest.mark.parametrize(("write", "absent"), [(write_lines, "an elephant"), (write_coco, "trains")])
def test_objects_of_pictures_that_are_not_asked_about_are_known(write: Any, absent: str, tmp_path: Path) -> None:
    benchmark = write(tmp_path)
    samples, _ = load_questions(benchmark, limit=1)
    scored = benchmark.score([f"A dog with {absent}."], samples)
    assert scored.figures["chair_i"] == 0.5 and list(scored.samples) == [0.5]


def test_what_people_mention_is_there_too(tmp_path: Path) -> None:
    said = [
        {"image_id": 0, "caption": "A mutt lies in front of a locomotive."},
        {"image_id": 2, "caption": "It is hot."},
        {"image_id": 2, "caption": "Dogs everywhere"},
    ]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"images": [], "annotations": said}))
    captions = str(tmp_path / "captions_val2014.json")
    samples, _ = load_questions(write_coco(tmp_path, captions=captions, vocabulary=write_synonyms(tmp_path)))
    assert [sample.answers for sample in samples] == [
        ("dog", "bench", "train"),
        ("person", "elephant"),
        ("hot dog", "dog"),  # two captions are no sentence: nothing is "hot dogs" there
    ]
    own = {"image": "a.png", "objects": [], "captions": ["A pew"]}
    lines, _ = load_questions(write_lines(tmp_path, [own], vocabulary=write_synonyms(tmp_path)))
    assert lines[-1].answers == ("bench",)


def test_a_list_of_synonyms_in_the_authors_form(tmp_path: Path) -> None:
    vocabulary = make_vocabulary(read_synonyms(write_synonyms(tmp_path)))
    text = "A Mutt, a baby elephant, an adult dog, two babies, a passenger train, pews and hot dogs"
    assert vocabulary.mentions(text) == ["dog", "elephant", "dog", "person", "train", "bench", "hot dog"]
    assert make_vocabulary([["dog"], ["Baby dog"]]).mentions("a baby dog") == ["baby dog"]  # what is given counts


def test_broken_records_are_counted_by_their_reason(tmp_path: Path) -> None:
    more = [
        {"image": "gone.png", "objects": ["dog"]},
        {"image": "a.png"},
        {"image": "a.png", "objects": "dog"},
        {"image": "a.png", "objects": ["dog", "!"]},
        {"image": "a.png", "objects": ["spaceship"]},
        {"image": "a.png", "objects": []},
        {"image": "a.png", "objects": ["dog"], "captions": "A dog"},
        [],
    ]
    benchmark = write_lines(tmp_path, more, vocabulary=write_synonyms(tmp_path))
    samples, report = load_questions(benchmark)
    assert len(samples) == 3
    assert [each.reason for each in report.rejected] == [
        "image file is missing",
        "objects is not a list of texts",
        "objects is not a list of texts",
        "objects is not a list of texts",
        "object is not in the vocabulary",
        "nothing is there",
        "captions is not a list of texts",
        "line is not a JSON object",
    ]
    # Without a list of words the objects of the good records are known, and no others.
    own = write_lines(tmp_path, more)
    assert own.score(["a spaceship and a train"], load_questions(own)[0][:1]).figures["chair_i"] == 1.0
    coco = write_coco(tmp_path, [{"image_id": 0, "category_id": 99}, {"image_id": 1}, {"image_id": 2, "caption": 3}])
    rejected = [(each.id, each.reason) for each in coco.read() if isinstance(each, Rejected)]
    assert rejected == [
        ("0", "objects is not a list of texts"),
        ("1", "objects is not a list of texts"),
        ("2", "captions is not a list of texts"),
    ]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "does not exist; check the path"),
        ({"images": [], "annotations": []}, {}, "has images, annotations only"),
        ({"images": [], "annotations": [], "categories": [{"id": 1}]}, {}, "name is missing"),
        ({"images": [], "annotations": [], "categories": []}, {"split": "val"}, "split='val' has no effect"),
        ({"images": [], "annotations": [], "categories": []}, {"captions": "gone"}, "'gone' does not exist"),
        ({"image": "a.png", "objects": ["dog"]}, {"captions": "gone"}, "captions='gone' has no effect"),
        ({"image": "a.png", "objects": ["dog"]}, {"vocabulary": "gone"}, "'gone' does not exist"),
    ],
)
def test_files_that_cannot_be_read(content: object, options: dict[str, str], message: str, tmp_path: Path) -> None:
    save_pictures(tmp_path)
    if content is not None:
        (tmp_path / "objects.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        list(make_benchmark({"benchmark": "chair", "path": str(tmp_path / "objects.json"), **options}).read())


def test_a_list_of_synonyms_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_bytes(b"dog, \xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 5\)"):
        list(read_synonyms(str(tmp_path / "synonyms.txt")))
