"""A stream is drawn from like samples in memory: the same at every step, by any number of processes and workers."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eyespot.config import ConfigError, DataSettings
from eyespot.data import mixture, sources
from eyespot.data.collate import Window
from eyespot.data.datamodule import Units, VLMDataModule, WindowSampler, group_numbers
from eyespot.data.sample import Sample
from eyespot.data.streaming import SampleStore, clear, stored, stream_key, streams_root, write_stores
from eyespot.processing.images import open_image

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _own_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / "cache"))


def write_questions(folder: Path, num_pictures: int = 12, each: int = 3) -> Path:
    """Questions in no order of pictures, one line that is no JSON, one without its picture, some without any."""
    colours = random.Random(0)
    for number in range(num_pictures):
        Image.new("RGB", (8, 8), tuple(colours.randrange(256) for _ in "rgb")).save(folder / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"id": f"{p}-{q}", "image": f"{p}.png", "question": f"what is {q}? ü", "answer": f"a{q}"}
        for p in range(num_pictures)
        for q in range(each)
    ]
    rows += [{"id": f"t{n}", "images": [], "question": "hm?", "answer": "words"} for n in range(4)]
    random.Random(1).shuffle(rows)
    rows.insert(5, {"id": "gone", "image": "gone.png", "question": "?", "answer": "!"})
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, "{")
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def settings(path: Path, **more: Any) -> DataSettings:
    return DataSettings({"format": "vqa", "path": str(path)}, streaming=True, **{"validation_share": 0.0, **more})


def test_what_is_stored_is_what_was_read(tmp_path: Path) -> None:
    path = write_questions(tmp_path)
    wanted, wanted_report = sources.load("vqa", path=str(path))
    train, validation, report = stored(settings(path), seed=0)
    assert list(train) == wanted and len(validation) == 0
    assert report == wanted_report and len(report.rejected) == 2
    assert train[-1] == wanted[-1] and train[2:4] == wanted[2:4]
    assert pickle.loads(pickle.dumps(train))[7] == wanted[7]
    with pytest.raises(IndexError, match="sample 40 of 40"):
        train[40]


@pytest.mark.parametrize("share", [1, 2, 8])
def test_units_are_those_of_samples_in_memory(tmp_path: Path, share: int) -> None:
    path = write_questions(tmp_path)
    samples, _ = sources.load("vqa", path=str(path))
    store, _, _ = stored(settings(path), seed=0)
    assert group_numbers(store).tolist() == group_numbers(samples).tolist()
    units, wanted = Units(store, share, 7), Units(samples, share, 7)
    visits = [(epoch, index) for epoch in (0, 3) for index in range(len(wanted))]
    assert len(units) == len(wanted) and units.sizes() == wanted.sizes()
    assert [units[visit] for visit in visits] == [wanted[visit] for visit in visits]
    assert [units.pictures(i) for i in range(len(units))] == [wanted.pictures(i) for i in range(len(units))]


def test_pictures_that_are_no_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = Image.effect_noise((9, 7), 90).convert("RGB")
    content = (write_questions(tmp_path).parent / "3.png").read_bytes()
    samples = [
        Sample.question("opened", pixels, "q", "a"),
        Sample.question("bytes", content, "q", "a"),
        replace(Sample.caption("both", pixels, ["one", "two"]), source="s", group="g"),
    ]
    monkeypatch.setattr(mixture, "interleaved", lambda *_: iter(samples))
    write_stores(tmp_path / "out", settings(tmp_path), seed=0)
    found = SampleStore(tmp_path / "out" / "train")
    assert found[1] == samples[1]
    assert [sample.messages for sample in found] == [sample.messages for sample in samples]
    assert open_image(found[0].images[0]).tobytes() == open_image(found[2].images[0]).tobytes() == pixels.tobytes()
    assert (found[2].captions, found[2].source, found[2].group) == (("one", "two"), "s", "g")
    assert group_numbers(found).tolist() == [0, 1, 2], "the same picture of another source shares nothing"


def test_no_picture_stands_on_both_sides(tmp_path: Path) -> None:
    path = write_questions(tmp_path, num_pictures=60, each=2)
    (tmp_path / "copy.png").write_bytes((tmp_path / "7.png").read_bytes())
    with path.open("a") as file:
        file.write(json.dumps({"id": "copy", "image": "copy.png", "question": "?", "answer": "!"}) + "\n")
    train, validation, report = stored(settings(path, validation_share=0.3), seed=0)
    sides = [{image for sample in side for image in sample.images} for side in (train, validation)]
    assert sides[0].isdisjoint(sides[1]) and 8 <= len(sides[1]) <= 28
    assert len(train) + len(validation) == report.accepted == 125
    assert (str(tmp_path / "copy.png") in sides[0]) == (str(tmp_path / "7.png") in sides[0]), "by content, not by name"
    other, _, _ = stored(settings(path, validation_share=0.3), seed=1)
    assert list(other) != list(train)


def test_a_sample_between_the_sides_is_left_out_and_broken_pictures_are_named(tmp_path: Path) -> None:
    path = write_questions(tmp_path, num_pictures=40, each=1)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    pairs = [{"id": f"p{n}", "images": [f"{n}.png", f"{n + 1}.png"], "question": "?", "answer": "!"} for n in range(39)]
    rows = [*pairs, {"id": "b", "image": "broken.png", "question": "?", "answer": "!"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, validation, report = stored(settings(path, validation_share=0.4), seed=0)
    reasons = Counter(rejected.reason for rejected in report.rejected)
    assert reasons["a picture cannot be opened"] == 1 and reasons["its pictures are on both sides of the split"] > 3
    sides = [{image for sample in side for image in sample.images} for side in (train, validation)]
    assert sides[0] and sides[1] and sides[0].isdisjoint(sides[1])


def test_given_validation_data_is_kept_apart(tmp_path: Path) -> None:
    path = write_questions(tmp_path)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (3, 3), "red").save(tmp_path / "other" / "red.png")
    row = {"id": "v", "image": "red.png", "question": "?", "answer": "!"}
    (tmp_path / "other" / "v.jsonl").write_text(json.dumps(row) + "\n")
    given = {"format": "vqa", "path": str(tmp_path / "other" / "v.jsonl")}
    train, validation, _ = stored(settings(path, validation=given), seed=0)
    assert [sample.id for sample in validation] == ["v"] and len(train) == 40
    (tmp_path / "other" / "red.png").write_bytes((tmp_path / "2.png").read_bytes())
    (tmp_path / "other" / "v.jsonl").write_text(json.dumps(row) + "\n\n")
    with pytest.raises(ConfigError, match="is also a validation picture"):
        stored(settings(path, validation=given), seed=0)
    assert not list(streams_root().glob(f"{stream_key(settings(path, validation=given), 0)}/*")), "nothing half stays"


def test_a_mixture_is_streamed_in_turns_and_filtered(tmp_path: Path) -> None:
    path = write_questions(tmp_path)
    source = {"format": "vqa", "path": str(path)}
    both = DataSettings({"one": source, "two": {**source, "limit": 3}}, validation_share=0.0, streaming=True,
                        filters={"text_length": {"min_chars": 3}})  # fmt: skip
    train, _, report = stored(both, seed=0)
    assert Counter(sample.source for sample in train) == Counter(s.source for s in train if s.texts[-1] == "words")
    plain, _, _ = stored(replace(both, filters={}), seed=0)
    assert [sample.source for sample in plain[:7]] == ["one", "two", "one", "two", "one", "two", "one"]
    assert sorted(s.id for s in plain) == sorted(s.id for s in mixture.read(both.train)[0])
    assert report.accepted == len(train) and {"one/gone", "one/questions:4"} <= {r.id for r in report.rejected}


def test_it_is_read_once_and_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_questions(tmp_path)
    stored(settings(path), seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "interleaved", lambda *_: pytest.fail("read again"))
        assert len(stored(settings(path), seed=0)[0]) == 40
    with path.open("a") as file:
        file.write(json.dumps({"images": [], "question": "new?", "answer": "yes"}) + "\n")
    assert len(stored(settings(path), seed=0)[0]) == 41
    assert clear() > 1000 and not streams_root().exists()
    with pytest.raises(ConfigError, match="no usable training sample; 0 accepted, 2 rejected"):
        path.write_text("{\n{\n")
        stored(settings(path), seed=0)


# --- order, processes, workers ------------------------------------------------------------------------------------


class Ids:
    """In place of a Collator: a window of nothing but ids."""

    accumulate = 2

    def __call__(self, units: Sequence[Sequence[Sample]]) -> Window:
        return Window(ids=[sample.id for unit in units for sample in unit])


def ids_by_step(store: Sequence[Sample], first: int, world: int, workers: int) -> list[list[list[str]]]:
    """For every step from the first one on and every process the ids that it reads."""
    columns = []
    for rank in range(world):
        data = VLMDataModule(store, [], Ids(), batch_size=6 // world, share=2, epochs=2.5, seed=3, num_workers=workers,  # type: ignore[arg-type]
                             world=world)  # fmt: skip
        data.sampler.start, data.sampler.rank, data.sampler.world = first, rank, world
        columns.append([window.ids for window in data.train_dataloader()])
    return [list(step) for step in zip(*columns, strict=True)]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_interrupted_at_any_step_every_sample_comes_as_it_would_have(tmp_path: Path, world: int, workers: int) -> None:
    store, _, _ = stored(settings(write_questions(tmp_path)), seed=0)
    whole = ids_by_step(store, 0, world, workers)
    for step in (1, 4, len(whole) - 1):
        assert whole[:step] + ids_by_step(store, step, world, workers) == whole
    one = ids_by_step(store, 0, 1, 0)
    dealt = [sorted(id for ids in step for id in ids) for step in whole]
    assert dealt == [sorted(step[0]) for step in one], "dealt out, not drawn anew"
    seen = Counter(id for step in whole for ids in step for id in ids)
    assert len(seen) == 40 and set(seen.values()) <= {2, 3} and sum(seen.values()) == pytest.approx(100, abs=3)


def test_a_window_that_cannot_be_divided_loses_nothing() -> None:
    ranks = [list(WindowSampler(11, 1, 6, 0, rank, 3)) for rank in range(3)]
    assert [[len(window) for window in windows] for windows in ranks] == [[2, 1], [2, 2], [2, 2]]
    assert sorted(index for windows in ranks for window in windows for _, index in window) == list(range(11))


def test_memory_holds_a_few_numbers_for_each_sample(tmp_path: Path) -> None:
    script = f"""
import json, resource, sys
from pathlib import Path
from eyespot.data.datamodule import Units, WindowSampler
from eyespot.data.streaming import SampleStore
import lightning
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before = resident()
store = SampleStore(Path({str(tmp_path / "big")!r}))
units = Units(store, 8, 0)
sampler = iter(WindowSampler(len(units), 1, 64, 0))
for _ in range(20):
    drawn = [units[visit] for visit in next(sampler)]
print((resident() - before) / len(store))
"""
    number = 100_000
    folder = tmp_path / "big"
    folder.mkdir()
    sample = {"id": "x", "images": ["x.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in it? " * 20}]},
        {"role": "assistant", "content": [{"type": "text", "text": "nothing"}]},
    ], "answers": [], "group": "", "captions": [], "source": "", "options": []}  # fmt: skip
    line = json.dumps(sample).encode() + b"\n"
    (folder / "samples.jsonl").write_bytes(line * number)
    (folder / "pictures.bin").touch()
    (torch.arange(1, number + 1) * len(line)).numpy().astype("<i8").tofile(folder / "ends.bin")
    (torch.arange(number) // 3).numpy().astype("<u8").tofile(folder / "keys.bin")
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 150, "bytes for each sample; a Sample in memory takes thousands"
