"""Samples to batches of pictures with texts: what a pair is, what counts as the same, what is left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eyespot
from drawn import draw_captions
from eyespot.data import sources
from eyespot.data.features import FeatureStore, picture_digest
from eyespot.data.pairs import NoPair, PairCollator, pair_of, picture_number, text_number, usable_samples
from eyespot.data.sample import Sample, image_part, text_part
from eyespot.processing.processor import Processor

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **SIZES}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 64, **SIZES}},
        alignment={"dim": 8, "max_text": 24},
    )[1]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return sources.load("captions", path=str(draw_captions(tmp_path / "drawn", 4)))[0]


def picture(color: str = "red") -> Image.Image:
    return Image.new("RGB", (16, 16), color)


def test_a_pair_is_one_picture_and_what_is_said_about_it(samples: list[Sample]) -> None:
    assert pair_of(samples[0])[1] == "a red circle"
    answer: Any = {"role": "assistant", "content": [text_part("b")]}
    question: Any = {"role": "user", "content": [image_part(), text_part("q")]}
    two_turns = Sample("turns", (picture(),), (question, answer, {"role": "user", "content": [text_part("q")]}, answer))
    two_pictures = Sample.question("pictures", (picture(), picture()), "q", "a")
    empty = Sample("empty", (picture(),), (question, {"role": "assistant", "content": [text_part(" ")]}))
    pairs, reasons = usable_samples([two_turns, samples[0], two_pictures, empty], pair_of)
    assert pairs == [samples[0]]
    assert [reason.split(";")[0] for reason in reasons] == [
        "sample 'turns' has not one picture and one answer but 1 and 2",
        "sample 'pictures' has not one picture and one answer but 2 and 1",
        "sample 'empty' has an empty text",
    ]
    with pytest.raises(NoPair, match="not one picture and one answer but 2 and 1; format captions gives such pairs"):
        pair_of(two_pictures)


def test_equal_pictures_and_equal_words_have_equal_numbers(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    picture("blue").save(tmp_path / "c.png")
    a, b, c = (picture_number(Sample.caption(name, str(tmp_path / f"{name}.png"), ["x"])) for name in "abc")
    assert a == b != c
    cropped = [Sample.caption(str(i), picture().crop((0, 0, 4 + i, 4)), ["x"], group="one") for i in range(2)]
    assert picture_number(cropped[0]) == picture_number(cropped[1])
    assert picture_number(cropped[0]) != picture_number(dataclasses.replace(cropped[0], group="two"))
    assert text_number("A  red\ncat ") == text_number("a red cat") != text_number("a red car")


def test_a_batch_holds_pictures_texts_and_conversations(processor: Processor, samples: list[Sample]) -> None:
    window = PairCollator(processor, rows=True)([[sample] for sample in samples])
    (batch,) = window.batches
    assert window.ids == [sample.id for sample in samples] and not window.rejected
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert {len(batch[name]) for name in batch} == {4}
    expected = processor.encode_conversation(samples[1].messages)
    length = len(expected.input_ids)
    assert batch["input_ids"][1, :length].tolist() == expected.input_ids
    assert batch["labels"][1, :length].tolist() == expected.labels and not batch["attention_mask"][1, length:].any()
    assert torch.equal(
        batch["text_ids"], processor.encode_texts([pair_of(sample)[1] for sample in samples])["text_ids"]
    )
    assert window.num_tokens == int(batch["text_mask"].sum()) + 4 * 4
    assert set(PairCollator(processor, rows=False)([samples]).batches[0]) == {
        "text_ids", "text_mask", "image_keys", "text_keys", "pixel_values",
    }  # fmt: skip


def test_what_cannot_be_used_is_left_out_and_named(processor: Processor, samples: list[Sample]) -> None:
    gone = Sample.caption("gone", "nowhere.png", ["x"])
    question = Sample.question("two", (picture(), picture()), "q", "a")
    long = Sample.caption("long", picture(), ["x" * 90])
    window = PairCollator(processor, rows=True, max_length=4)([[gone, question, long]])
    assert not window.batches and not window.ids and window.num_tokens == 0
    assert [rejected.id for rejected in window.rejected] == ["gone", "two", "long"]
    window = PairCollator(processor, rows=False)([[gone], [samples[0]], [long]])
    assert window.ids == [samples[0].id, "long"] and len(window.batches[0]["image_keys"]) == 2


def test_features_stand_for_pictures(processor: Processor, samples: list[Sample], tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    features = torch.randn(4, 4, 16)
    store.add([picture_digest(sample.images[0]) for sample in samples], features)
    collator = PairCollator(processor, rows=False, features=store)
    batch = collator.whole()([[samples[2], samples[0]]]).batches[0]
    assert "pixel_values" not in batch and torch.equal(batch["image_features"], features[[2, 0]])
