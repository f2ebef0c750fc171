"""Names and boxes in texts, and batches of pictures whose objects are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eyespot.data.boxes import Box, named_text, parse_boxes, parse_named
from eyespot.data.collate import Window
from eyespot.data.formats.detection import read_detection
from eyespot.data.formats.scenes import read_scenes
from eyespot.data.objects import ObjectCollator, objects_of
from eyespot.data.pairs import NoPair
from eyespot.data.sample import Rejected, Sample
from eyespot.processing.images import EyespotImageProcessor
from eyespot.processing.processor import Processor
from eyespot.processing.prompt import TEMPLATES
from eyespot.processing.tokenizers import byte_tokenizer

PICTURE = Image.new("RGB", (8, 8), "red")


def processor() -> Processor:
    return Processor(
        image_processor=EyespotImageProcessor(size=8),
        tokenizer=byte_tokenizer(),
        chat_template=TEMPLATES["plain"],
        image_token_id=300,
        num_image_tokens=4,
    )


def sample(id: str, answer: str) -> Sample:
    return Sample.question(id, PICTURE, "Find all objects in this image.", answer)


def collate(*samples: Sample) -> Window:
    return ObjectCollator(processor())([[one] for one in samples])


edges = st.integers(0, 98).flatmap(lambda low: st.tuples(st.just(low), st.integers(low + 1, 99)))
names = st.from_regex(r"[a-z]+( [a-z]+){0,2}", fullmatch=True)


@given(st.lists(st.tuples(names, edges, edges), min_size=1, max_size=9))
def test_what_is_written_is_read(objects: list[tuple[str, tuple[int, int], tuple[int, int]]]) -> None:
    known = [(name, Box(x[0] / 99, y[0] / 99, x[1] / 99, y[1] / 99)) for name, x, y in objects]
    assert parse_named(named_text(known)) == known
    assert parse_named(named_text(known) + ".") == known


def test_other_ways_to_write_it() -> None:
    assert [name for name, _ in parse_named("a dog at [10, 20, 30, 40]; pear: (50 60 70 80).")] == ["a dog at", "pear"]
    assert parse_named("10 20 30 40, pear 30 20 10 40") == []  # no name; no box
    assert parse_boxes("It is at 00 10 50 99.") == [Box(0, 10 / 99, 50 / 99, 1)]
    assert parse_boxes("00 10 50 99.5") == []


def test_scenes_tell_their_objects() -> None:
    for one in read_scenes(20, questions=["detect", "count"]):
        assert isinstance(one, Sample)
        if "detect" in one.id:
            _, objects = objects_of(one)
            assert 1 <= len(objects) <= 8 and all(box.area > 0 for _, box in objects)
            across = [box.centre[0] for _, box in objects]
            assert across == pytest.approx(sorted(across), abs=0.02)


def test_detection_files_tell_their_objects(tmp_path: Path) -> None:
    for number in (1, 2):
        Image.new("RGB", (100, 50)).save(tmp_path / f"{number}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 50} for i in (1, 2)],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "red pear"}],
        "annotations": [
            {"image_id": 1, "category_id": 2, "bbox": [50, 0, 50, 50]},
            {"image_id": 1, "category_id": 1, "bbox": [0, 5, 50, 45]},
            {"image_id": 2, "category_id": 1, "bbox": [0, 5, 50, 45], "iscrowd": 1},
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (found,) = read_detection(tmp_path / "truth.json", questions=["detect"])
    assert isinstance(found, Sample) and found.answers == ("dog 00 10 50 99, red pear 50 00 99 99",)


def test_a_batch() -> None:
    window = collate(sample("a", "dog 00 10 50 99, red pear 50 00 99 99"), sample("b", "dog 10 10 20 20"))
    (batch,) = window.batches
    assert window.ids == ["a", "b"] and window.num_tokens == 8
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["object_image"].tolist() == [0, 0, 1] and batch["object_name"].tolist() == [0, 1, 0]
    torch.testing.assert_close(batch["object_box"][1], torch.tensor([50 / 99, 0.0, 1.0, 1.0]))
    words = [
        bytes(processor().tokenizer(f" {name}", add_special_tokens=False).input_ids) for name in ("dog", "red pear")
    ]
    assert [bytes(id - 1 for id in row if id) for row in batch["name_ids"].tolist()] == words


def test_what_lists_no_objects_is_named() -> None:
    window = collate(sample("good", "dog 00 10 50 99"), sample("bad", "a dog"))
    assert window.ids == ["good"]
    assert [rejected.id for rejected in window.rejected] == ["bad"] and isinstance(window.rejected[0], Rejected)
    with pytest.raises(NoPair, match=r"no object in its answer 'a dog', which should read like 'dog 00 10 50 99"):
        objects_of(sample("bad", "a dog"))
    assert collate(sample("bad", "a dog")).batches == []
