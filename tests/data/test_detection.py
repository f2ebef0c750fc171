from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from eyespot.data import sources
from eyespot.data.boxes import parse_boxes
from eyespot.data.formats.detection import read_detection
from eyespot.data.sample import Rejected, Sample

NAMES = ["dog", "cat", "kite", "person"]


def coco(folder: Path, contents: Sequence[Mapping[str, Any]], crowds: dict[int, str] | None = None) -> Path:
    """A file with a picture of 100 x 50 for each entry: boxes by name, and a name that is a crowd there."""
    PIL.Image.new("RGB", (100, 50)).save(folder / "a.png")
    record: dict[str, Any] = {
        "images": [{"id": i, "file_name": "a.png", "width": 100, "height": 50} for i in range(len(contents))],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(NAMES)],
        "annotations": [
            {"image_id": i, "category_id": 10 + NAMES.index(name), "bbox": box, "iscrowd": 0}
            for i, boxes in enumerate(contents)
            for name, found in boxes.items()
            for box in found
        ],
    }
    for i, name in (crowds or {}).items():
        record["annotations"].append({"image_id": i, "category_id": 10 + NAMES.index(name), "bbox": {}, "iscrowd": 1})
    path = folder / "instances.json"
    path.write_text(json.dumps(record))
    return path


def asked(path: Path, **options: Any) -> list[tuple[int, str, str]]:
    """(picture, question, answer) of all samples; nothing was rejected."""
    found = list(read_detection(path, **options))
    assert all(isinstance(item, Sample) for item in found)
    return [(int(s.id.split(":")[1]), s.messages[0]["content"][1]["text"], s.answers[0]) for s in found]  # type: ignore[union-attr]


def box(left: float = 10) -> list[float]:
    return [left, 10, 20, 20]


def test_list_names_each_kind_once_from_left_to_right(tmp_path: Path) -> None:
    contents = [{"cat": [box(60), box(0)], "dog": [box(30)], "kite": [box(5)]}, {"kite": [box()]}, {}]
    found = asked(coco(tmp_path, contents, {1: "person"}), questions=["list"])
    question = "What objects are in this image?"
    assert found == [(0, question, "cat, kite, dog"), (1, question, "kite, person")]


def test_where_is_what_occurs_once(tmp_path: Path) -> None:
    contents = [{"dog": [[10, 10, 20, 20]], "cat": [box(), box(50)], "kite": [[0, 0, 2, 20]], "person": [box()]}]
    found = asked(coco(tmp_path, contents, {0: "person"}), questions=["where"])
    assert found == [(0, "Where is the dog?", "10 20 30 59")]
    assert parse_boxes(found[0][2])[0] == pytest.approx((0.1, 0.2, 0.3, 0.6), abs=0.005)


@pytest.mark.parametrize("absent", ["random", "adversarial"])
def test_presence_is_half_yes_for_each_name(tmp_path: Path, absent: str) -> None:
    contents = [{name: [box()] for j, name in enumerate(NAMES) if i % (j + 2) == 0} for i in range(60)]
    found = asked(coco(tmp_path, contents), questions=["presence"], absent=absent)
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for picture, question, answer in found:
        name = next(name for name in NAMES if name in question)
        votes[name][answer] += 1
        assert answer == ("yes" if name in contents[picture] else "no")
    assert {name: (v["yes"], v["no"]) for name, v in votes.items()} == {
        "dog": (30, 30), "cat": (20, 20), "kite": (15, 15), "person": (12, 12)
    }  # fmt: skip
    assert len(set(found)) == len(found)


def test_adversarial_absence_is_asked_where_its_company_is(tmp_path: Path) -> None:
    alone = [{"dog": [box()], "cat": [box()]}] * 3 + [{"cat": [box()]}] * 3 + [{"kite": [box()]}] * 20
    path = coco(tmp_path, alone)
    no = {picture for picture, question, answer in asked(path, questions=["presence"], absent="adversarial")
          if "dog" in question and answer == "no"}  # fmt: skip
    assert no == {3, 4, 5}


def test_a_crowd_is_present_but_not_counted(tmp_path: Path) -> None:
    contents = [{"dog": [box()] * n} for n in (1, 2, 3, 4, 5)] + [{"dog": [box()] * 2}, {}]
    path = coco(tmp_path, contents, {5: "dog", 6: "dog"})
    counted = asked(path, questions=["count"])
    assert sorted(counted) == [(i, "How many dogs are in the image?", str(i + 1)) for i in range(5)]


def test_counts_are_uniform_for_each_name(tmp_path: Path) -> None:
    contents = [{"dog": [box()] * n, "cat": [box()] * min(n, 4)} for n in (1, 2, 3, 4, 5) for _ in range(8 - n)]
    found = asked(coco(tmp_path, contents), questions=["count"])
    assert Counter(answer for _, _, answer in found) == dict.fromkeys("12345", 3)
    assert {question for _, question, _ in found} == {"How many dogs are in the image?"}  # there are never five cats


def test_all_kinds_with_ids_groups_and_seed(tmp_path: Path) -> None:
    contents = [{"dog": [box()] * (1 + i % 5), **({"cat": [box()]} if i % 3 else {})} for i in range(20)]
    path = coco(tmp_path, contents)
    samples, report = sources.load("detection", path=path, seed=1)
    assert report.rejected == [] and len({s.id for s in samples}) == len(samples)
    assert {s.id.split(":")[2] for s in samples} == {"list", "presence", "count", "where", "detect"}
    assert {s.group for s in samples} == {str(tmp_path / "a.png")}
    assert samples == sources.load("detection", path=path, seed=1)[0] != sources.load("detection", path=path, seed=2)[0]


@pytest.mark.parametrize(
    ("where", "record", "reason"),
    [
        ("images", {"id": 9, "file_name": "no.png", "width": 5, "height": 5}, "image file is missing"),
        ("images", {"id": 9, "file_name": "a.png", "width": 0, "height": 5}, "image has no width and height"),
        ("images", {"file_name": "a.png", "width": 5, "height": 5}, "image has no id"),
        ("images", {"id": [1], "file_name": "a.png", "width": 5, "height": 5}, "image has no id"),
        ("images", 3, "image has no id"),
        ("annotations", {"image_id": [7], "category_id": 10, "bbox": [1, 1, 2, 2]}, "annotation of an unknown image"),
        ("annotations", {"image_id": 7, "category_id": 10, "bbox": [1, 1, 2, 2]}, "annotation of an unknown image"),
        ("annotations", {"image_id": 0, "category_id": 1, "bbox": [1, 1, 2, 2]}, "annotation of an unknown category"),
        ("annotations", {"image_id": 0, "category_id": 10, "bbox": [1, 1, 2]}, "bbox is not a list of four numbers"),
        ("annotations", {"image_id": 0, "category_id": 10, "bbox": [1, 1, "2", 2]}, "bbox is not a list of four"),
        ("annotations", {"image_id": 0, "category_id": 10, "bbox": [1, 1, float("nan"), 2]}, "bbox is not a list"),
        ("annotations", {"image_id": 0, "category_id": 10, "bbox": [300, 1, 2, 2]}, "bbox has no area inside"),
        ("annotations", {"image_id": 0, "category_id": [1], "bbox": [1, 1, 2, 2]}, "annotation of an unknown category"),
        ("annotations", [], "annotation is not a JSON object"),
    ],
)
def test_bad_records_are_rejected_and_the_others_are_read(tmp_path: Path, where: str, record: Any, reason: str) -> None:
    path = coco(tmp_path, [{"dog": [box()]}])
    content = json.loads(path.read_text())
    content[where].append(record)
    path.write_text(json.dumps(content))
    found = list(read_detection(path, questions=["list"]))
    (rejected,) = (item for item in found if isinstance(item, Rejected))
    assert rejected.reason.startswith(reason)
    assert [item.answers for item in found if isinstance(item, Sample)] == [("dog",)]


def test_annotations_of_a_missing_picture_are_not_counted_twice(tmp_path: Path) -> None:
    path = coco(tmp_path, [{"dog": [box()]}])
    (tmp_path / "a.png").unlink()
    assert [type(item) for item in read_detection(path)] == [Rejected]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON: .* at line 1"),
        ("[]", "is not COCO's form; it needs the lists images, annotations, categories"),
        ('{"images": [], "annotations": {}, "categories": []}', "is not COCO's form"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "category 1 has no id or name"),
    ],
)
def test_files_of_another_form(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        next(read_detection(path))


def test_unknown_words(tmp_path: Path) -> None:
    path = coco(tmp_path, [{}])
    with pytest.raises(ValueError, match=r"unknown question 'were'; did you mean 'where'\?"):
        next(read_detection(path, questions=["were"]))
    with pytest.raises(ValueError, match="absent is 'never'; choices: random, adversarial"):
        next(read_detection(path, absent="never"))  # type: ignore[arg-type]
    (tmp_path / "instances.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        next(read_detection(path))
