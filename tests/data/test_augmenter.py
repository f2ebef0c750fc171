"""Augmentation of visits: really applied, the same for the same visit, never in the validation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import eyespot
from eyespot.config import build_parts
from eyespot.data.augmenter import Augmenter
from eyespot.data.boxes import Box, parse_boxes
from eyespot.data.collate import Collator, Window
from eyespot.data.datamodule import Units, VLMDataModule
from eyespot.data.sample import Sample
from eyespot.registry import AUGMENTATIONS

ALL: dict[str, Any] = {"crop": {"scale": [0.4, 0.8], "spare": []}, "flip": {}, "color": {}, "hue": {"spare": []}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture(scope="module")
def processor() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 96, **sizes}},
    )[1]


def make(**given: Any) -> Augmenter:
    return Augmenter(build_parts(AUGMENTATIONS, given, "data.augment"))


def samples(folder: Path, each: int = 3) -> list[Sample]:
    return [
        Sample.question(f"{p}-{q}", str(folder / f"{p}.png"), f"Is it on the left or on the right of {q}?", "left")
        for p in range(6)
        for q in range(each)
    ]


def words(sample: Sample) -> list[str]:
    return [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]


def pixels(sample: Sample) -> np.ndarray[Any, Any]:
    return np.asarray(sample.images[0])


def test_a_mirrored_picture_is_told_mirrored(folder: Path) -> None:
    unit = samples(folder)[:3]
    changed = make(flip={"probability": 1.0})(unit, random.Random(0))
    assert (pixels(changed[0]) == np.asarray(Image.open(folder / "0.png"))[:, ::-1]).all()
    assert words(changed[1]) == ["Is it on the right or on the left of 1?", "right"]
    assert changed[1].answers == ("right",)
    assert [sample.id for sample in changed] == [sample.id for sample in unit]
    assert unit == samples(folder)[:3]
    assert make(flip={"probability": 0.0})(unit, random.Random(0))[0].messages == unit[0].messages


def test_samples_of_a_unit_go_on_sharing_their_picture(folder: Path, processor: Any) -> None:
    changed = make(**ALL)(samples(folder)[:3], random.Random(0))
    assert changed[0].images[0] is changed[1].images[0] is changed[2].images[0]
    window = Collator(processor, row_length=400)([changed])
    assert window.batches[0]["pixel_values"].shape == (1, 3, 16, 16) and len(window.ids) == 3


def test_one_doubtful_text_spares_the_whole_unit(folder: Path) -> None:
    unit = samples(folder)[:2]
    doubtful = Sample.question("x", unit[0].images[0], "Is that right?", "yes")
    changed = make(flip={"probability": 1.0})([*unit, doubtful], random.Random(0))
    assert [sample.messages for sample in changed] == [sample.messages for sample in [*unit, doubtful]]
    assert (pixels(changed[0]) == np.asarray(Image.open(folder / "0.png"))).all()


def test_several_pictures_are_cropped_one_by_one_and_not_mirrored(folder: Path) -> None:
    pair = Sample.question("pair", (str(folder / "0.png"), str(folder / "1.png")), "Which one is left?", "the first")
    changed = make(flip={"probability": 1.0, "spare": []})([pair], random.Random(0))[0]
    assert words(changed) == words(pair)
    assert (np.asarray(changed.images[1]) == np.asarray(Image.open(folder / "1.png"))).all()
    cropped = make(crop={"scale": [0.3, 0.6], "spare": []})([pair], random.Random(0))[0]
    assert cropped.images[0].size != cropped.images[1].size  # type: ignore[union-attr]


def test_boxes_are_mirrored_and_what_cannot_be_followed_is_spared(folder: Path) -> None:
    box = Box(0.1, 0.2, 0.4, 0.8)
    image = str(folder / "0.png")
    boxed = Sample.question("boxed", image, "Where is the dog?", f"the dog: {box.to_text()}.")
    flipped = make(flip={"probability": 1.0})([boxed], random.Random(0))[0]
    assert parse_boxes(flipped.answers[0].rstrip("."))[0] == pytest.approx(Box(0.6, 0.2, 0.9, 0.8), abs=0.011)
    assert words(flipped)[1] == flipped.answers[0] != boxed.answers[0]
    again = make(flip={"probability": 1.0})([flipped], random.Random(0))[0]
    assert again.answers == boxed.answers
    for augmenter in (make(crop={"spare": []}), make(flip={"probability": 1.0, "spare": []})):
        unknown = ["<loc0012><loc0034>", "[0.1, 0.2, 0.3, 0.4]", "at (12, 34)", "10, 20, 30, 40", "<box>", "1 2 3 4"]
        answers = unknown + (["00 10 50 99"] if "crop" in augmenter.summary([[boxed]])[0] else [])
        for answer in answers:
            sample = Sample.question("s", image, "Where is it?", answer)
            assert words(augmenter([sample], random.Random(0))[0])[1] == answer
            assert augmenter([sample], random.Random(0))[0].images[0].size == (40, 30)  # type: ignore[union-attr]
    assert make(crop={"spare": []}).summary([[boxed]]) == ["crop may change 0 of 1 (1 x has boxes)"]
    other = Sample.question("s", image, "Where is it?", "[1, 2, 3, 4]")
    assert make(flip={}).summary([[other]]) == [
        "flip may change 0 of 1 (1 x has coordinates in a form that is not known)"
    ]
    assert make(color={}).summary([[other]]) == ["color may change 1 of 1"]


def test_text_alone_and_broken_pictures_are_left_to_others(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    for image in ((), str(folder / "broken.png")):
        sample = Sample.question("x", image, "on the left?", "yes")
        assert make(**ALL)([sample], random.Random(0)) == [sample]
    assert make(flip={}).summary([[Sample.question("x", (), "on the left?", "yes")]]) == ["flip may change 0 of 0"]


def test_a_drawn_caption_is_told_mirrored_and_the_others_are_gone(folder: Path) -> None:
    captions = ["a dog on the left", "a cat to the right"]
    units = Units([Sample.caption("c", str(folder / "0.png"), captions)], 1, 0, make(flip={"probability": 1.0}))
    told = {words(units[(epoch, 0)][0])[-1] for epoch in range(12)}
    assert told == {"a dog on the right", "a cat to the left"}
    assert units[(0, 0)][0].captions == ()


# --- on the way to the model ----------------------------------------------------------------------------------------


def module(folder: Path, processor: Any, augmenter: Augmenter | None, **given: Any) -> VLMDataModule:
    data, held_out = samples(folder)[:12], samples(folder)[12:]
    return VLMDataModule(data, held_out, Collator(processor), batch_size=12, epochs=2, augmenter=augmenter, **given)


def windows(folder: Path, processor: Any, augmenter: Augmenter | None, start: int = 0, **given: Any) -> list[Window]:
    data = module(folder, processor, augmenter, **given)
    data.sampler.start = start
    return list(data._loader(data.train_units, data.sampler, data.collator))


def by_id(window: Window) -> dict[str, torch.Tensor]:
    return dict(zip(window.ids, window.batches[0]["pixel_values"], strict=True))


def test_pixels_differ_between_epochs_and_are_equal_on_resume(folder: Path, processor: Any) -> None:
    plain = windows(folder, processor, None)
    first, second = windows(folder, processor, make(**ALL))
    assert by_id(first).keys() == by_id(second).keys() == by_id(plain[0]).keys()
    for id, tensor in by_id(first).items():
        assert not torch.equal(tensor, by_id(second)[id])
        assert not torch.equal(tensor, by_id(plain[0])[id])
        assert torch.equal(by_id(plain[0])[id], by_id(plain[1])[id])
    (resumed,) = windows(folder, processor, make(**ALL), start=1)
    assert resumed.ids == second.ids
    assert all(torch.equal(resumed.batches[0][name], second.batches[0][name]) for name in second.batches[0])
    assert [window.ids for window in plain] == [first.ids, second.ids]  # the order of data stays
    other = windows(folder, processor, make(**ALL), seed=7)[0]
    assert not torch.equal(by_id(other)["0-0"], by_id(first)["0-0"])


def test_worker_processes_make_the_same_visits(folder: Path, processor: Any) -> None:
    here, there = (windows(folder, processor, make(**ALL), num_workers=n) for n in (0, 1))
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one.batches[0][name], other.batches[0][name]) for name in one.batches[0])


def test_the_validation_sees_no_augmentation(folder: Path, processor: Any) -> None:
    loaders = [module(folder, processor, augmenter).val_dataloader() for augmenter in (None, make(**ALL))]
    for plain, augmented in zip(*loaders, strict=True):
        assert plain.ids == augmented.ids
        assert all(torch.equal(plain.batches[0][name], augmented.batches[0][name]) for name in plain.batches[0])


def test_what_may_change_is_counted(folder: Path, processor: Any) -> None:
    data = module(folder, processor, make(crop={}, color={}))
    assert data.train_units.augmentation() == [
        "crop may change 0 of 12 (12 x speaks of position)",
        "color may change 12 of 12",
    ]
    assert module(folder, processor, None).train_units.augmentation() == []
    many = Units(samples(folder) * 300, 1, 0, make(color={}))
    assert many.augmentation() == ["color may change 1,800 of 1,800"]
