from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.data import sources
from eyespot.data.sample import LoadReport, Rejected, Sample
from eyespot.data.sources import load, split_by_image, stream
from eyespot.processing.images import ImageError, content_hash
from eyespot.registry import Registry


def read_numbers(count: int, every: int = 3) -> Iterator[Sample | Rejected]:
    for number in range(count):
        if number % every == every - 1:
            yield Rejected(f"n{number}", "unlucky")
        else:
            yield Sample.question(f"n{number}", (), "what?", str(number))


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FORMATS", Registry("data format", {"numbers": read_numbers}))


class TestLoad:
    def test_samples_and_report(self) -> None:
        samples, report = load("numbers", count=7)
        assert [sample.id for sample in samples] == ["n0", "n1", "n3", "n4", "n6"]
        assert report.accepted == 5
        assert report.summary() == "5 accepted, 2 rejected\n  2 x unlucky: n2, n5"

    def test_limit_counts_accepted_samples_and_stops(self) -> None:
        samples, report = load("numbers", limit=3, count=10**12)
        assert [sample.id for sample in samples] == ["n0", "n1", "n3"]
        assert (report.accepted, len(report.rejected)) == (3, 1)

    def test_errors_come_before_reading(self) -> None:
        with pytest.raises(ValueError, match="unknown data format 'number'; did you mean 'numbers'"):
            load("number")
        with pytest.raises(
            ValueError, match=r"'numbers' has no option 'cuont'; did you mean 'count'\? \(options: count, every\)"
        ):
            load("numbers", cuont=3)
        with pytest.raises(ValueError, match=r"'numbers' needs the option 'count'; give count=\.\.\."):
            load("numbers")
        with pytest.raises(ValueError, match="limit is 0; give 1 or more"):
            load("numbers", limit=0, count=3)

    def test_a_bar_appears_on_a_terminal_when_work_is_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setenv("TERM", "xterm")
        for after_s, shown in ((-1.0, True), (60.0, False)):
            terminal = Terminal()
            monkeypatch.setattr(sys, "stderr", terminal)
            monkeypatch.setattr(sources, "_PROGRESS_AFTER_S", after_s)
            assert len(load("numbers", count=900)[0]) == 600
            assert ("reading numbers" in terminal.getvalue()) is shown

    def test_real_formats_are_registered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        path = tmp_path / "q.jsonl"
        path.write_text(json.dumps({"images": [], "question": "why?", "answer": "so"}))
        assert [sample.id for sample in load("vqa", path=path)[0]] == ["q:1"]


class TestStream:
    def test_lazy_with_a_report(self) -> None:
        report = LoadReport()
        samples = stream("numbers", report, count=10**12)
        assert [next(samples).id for _ in range(3)] == ["n0", "n1", "n3"]
        assert (report.accepted, len(report.rejected)) == (3, 1)

    def test_without_a_report_rejections_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            assert len(list(stream("numbers", count=7))) == 5
        assert caplog.messages == ["5 accepted, 2 rejected\n  2 x unlucky: n2, n5"]

    def test_options_are_checked_before_the_first_sample(self) -> None:
        with pytest.raises(ValueError, match="no option 'limit'"):
            stream("numbers", count=3, limit=3)


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))


def encoded(image: PIL.Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def ids(samples: list[Sample]) -> list[str]:
    return [sample.id for sample in samples]


class TestSplitByImage:
    def test_a_broken_picture_is_an_error_or_a_rejected_sample(self, tmp_path: Path) -> None:
        samples = []
        for number in range(4):
            PIL.Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
            samples.append(Sample.question(str(number), str(tmp_path / f"{number}.png"), "q", "a"))
        (tmp_path / "2.png").write_bytes(b"no picture")
        with pytest.raises(ImageError, match=r"2\.png"):
            split_by_image(samples, 0.4, seed=0)
        report = LoadReport(accepted=4)
        kept, held_out = split_by_image(samples, 0.4, seed=0, report=report)
        assert sorted(sample.id for sample in [*kept, *held_out]) == ["0", "1", "3"]
        assert report.accepted == 3
        assert [(r.id, r.reason) for r in report.rejected] == [("2", "a picture cannot be opened")]

    def test_one_picture_under_many_names_stays_together(self, tmp_path: Path) -> None:
        samples = []
        for seed in range(20):
            for copy, format in enumerate(("PNG", "BMP", "TIFF")):
                path = tmp_path / f"{seed}-{copy}.{format.lower()}"
                path.write_bytes(encoded(picture(seed), format))
                samples.append(Sample.question(f"{seed}/{copy}", str(path), "what?", "dots"))
            samples.append(Sample.question(f"{seed}/bytes", encoded(picture(seed), "PNG"), "what?", "dots"))
            samples.append(Sample.question(f"{seed}/pillow", picture(seed), "what?", "dots"))
        kept, held_out = split_by_image(samples, 0.25, seed=1)
        sides = [{name.split("/")[0] for name in ids(side)} for side in (kept, held_out)]
        assert sides[0].isdisjoint(sides[1])
        assert [len(side) for side in sides] == [15, 5]
        assert [len(side) for side in (kept, held_out)] == [75, 25]

    def test_deterministic_and_independent_of_order_and_names(self) -> None:
        samples = [Sample.question(f"s{seed}", picture(seed), "what?", "dots") for seed in range(30)]
        held_out = ids(split_by_image(samples, 0.3, seed=5)[1])
        assert held_out == ids(split_by_image(samples, 0.3, seed=5)[1])
        assert sorted(held_out) == sorted(ids(split_by_image(samples[::-1], 0.3, seed=5)[1]))
        renamed = [Sample.question(f"z{90 - seed}", picture(seed), "who?", "dots") for seed in range(30)]
        assert [f"z{90 - int(name[1:])}" for name in held_out] == ids(split_by_image(renamed, 0.3, seed=5)[1])
        assert held_out != ids(split_by_image(samples, 0.3, seed=6)[1])

    def test_shared_picture_ties_samples_of_several_pictures(self) -> None:
        chain = [Sample.question(f"c{n}", (picture(n), picture(n + 1)), "which?", "none") for n in range(6)]
        other = Sample.question("other", picture(99), "what?", "dots")
        for seed in range(8):
            kept, held_out = split_by_image([*chain, other], 0.5, seed)
            assert sorted(map(len, (kept, held_out))) == [1, 6]

    def test_group_ties_too(self) -> None:
        samples = [Sample.question(f"s{n}", picture(n), "what?", "dots", group=f"g{n % 2}") for n in range(10)]
        for side in split_by_image(samples, 0.5, seed=0):
            assert len({sample.group for sample in side}) == 1

    @settings(deadline=None, max_examples=50)
    @given(
        st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.integers(0, 5)), min_size=2, max_size=25),
        st.floats(0.05, 0.95),
        st.integers(0, 3),
    )
    def test_disjoint_complete_and_in_order(
        self, rows: list[tuple[list[int], int]], fraction: float, seed: int
    ) -> None:
        samples = [
            Sample.question(f"t{text}", tuple(encoded(picture(n), "PNG") for n in own), "what?", "dots")
            for own, text in rows
        ]
        try:
            sides = split_by_image(samples, fraction, seed)
        except ValueError as error:
            assert "1 picture cannot be split" in str(error)
            return
        pictures = [{image for sample in side for image in sample.images} for side in sides]
        texts = [{sample.id for sample in side if not sample.images} for side in sides]
        assert pictures[0].isdisjoint(pictures[1])
        assert texts[0].isdisjoint(texts[1])
        assert all(sides)
        assert sum(map(len, sides)) == len(samples)
        for side in sides:
            places = [next(i for i, sample in enumerate(samples) if sample is own) for own in side]
            assert places == sorted(places)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
    def test_fraction_out_of_range(self, fraction: float) -> None:
        with pytest.raises(ValueError, match="fraction is"):
            split_by_image([], fraction, 0)

    def test_too_few_pictures_and_broken_ones(self) -> None:
        same = [Sample.question(f"s{n}", picture(0), "what?", "dots") for n in range(5)]
        with pytest.raises(ValueError, match="1 picture cannot be split into two sides"):
            split_by_image(same, 0.5, 0)
        broken: Any = Sample.question("b", "/no/such.png", "what?", "dots")
        with pytest.raises(ImageError, match=r"'/no/such\.png' does not exist"):
            split_by_image([*same, broken], 0.5, 0)

    def test_each_of_many_files_is_decoded_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        samples = []
        for number in range(400):
            base[0, 0, 0], base[0, 0, 1] = number % 256, number // 256
            path = tmp_path / f"{number}.bmp"
            PIL.Image.fromarray(base).save(path)
            samples += [Sample.question(f"{number}-{n}", str(path), "what?", "dots") for n in range(5)]
        decoded: list[Any] = []

        def counted(image: Any) -> str:
            decoded.append(image)
            return content_hash(image)

        monkeypatch.setattr("eyespot.processing.images.content_hash", counted)
        kept, held_out = split_by_image(samples, 0.1, seed=0)
        assert len(decoded) == 400
        assert (len(kept), len(held_out)) == (1_800, 200)
