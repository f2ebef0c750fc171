"""`eyespot data report`: its numbers against what was put in, and what stands on the page."""

from __future__ import annotations

import base64
import inspect
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import eyespot
from eyespot.cli import main
from eyespot.config import DataSettings, build_parts, check_mixture, from_dict
from eyespot.data import report_page
from eyespot.data.augmenter import Augmenter
from eyespot.data.report import DataReport, describe
from eyespot.data.sample import LoadReport, Sample
from eyespot.registry import AUGMENTATIONS, FILTERS
from eyespot.training.run import load_samples


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    """Two sources: nine questions about three pictures, a copy, what cannot be read; captions of another picture."""
    sizes = [(40, 40), (80, 40), (40, 120)]
    rows = []
    for number, size in enumerate(sizes):
        photo(number, size).save(tmp_path / f"{number}.png")
        rows += [
            {"image": f"{number}.png", "question": "Is it on the left?", "answer": answer}
            for answer in ("no", "yes", "no")
        ]
    photo(0, (40, 40)).save(tmp_path / "copy.jpg", quality=80)
    rows.append({"image": "copy.jpg", "question": "What is this?", "answer": "a <b>picture</b>"})
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    rows.append({"image": "broken.png", "question": "What is this?", "answer": "nothing"})
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(rows))
    )
    photo(9, (60, 60)).save(tmp_path / "9.png")
    captions = {"id": "c", "image": "9.png", "captions": ["a blur", "some colours"]}
    (tmp_path / "told.jsonl").write_text(json.dumps(captions) + "\n")
    return DataSettings(
        train={
            "asked": {"format": "vqa", "path": str(tmp_path / "asked.jsonl"), "weight": 1},
            "told": {"format": "captions", "path": str(tmp_path / "told.jsonl"), "weight": 3},
        },
        share=1,
    )


@pytest.fixture(scope="module")
def processor() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 96, **sizes}},
    )[1]


def described(data: DataSettings, processor: Any, augmenter: Augmenter | None = None) -> DataReport:
    samples, report = load_samples(data)
    return describe(samples, report, data, processor, augmenter)


def test_numbers_are_those_of_the_data(data: DataSettings, processor: Any) -> None:
    facts = described(data, processor).facts
    assert (facts["samples"], facts["pictures"], facts["unreadable_pictures"]) == (12, 5, 1)
    assert facts["samples_without_picture"] == 0 and facts["left_out"] == {}
    assert facts["sources"] == {
        "asked": {"samples": 11, "weight": 1, "visits_of_an_epoch": 3, "share_of_visits": 0.25},
        "told": {"samples": 1, "weight": 3, "visits_of_an_epoch": 9, "share_of_visits": 0.75},
    }
    answers = facts["answers"]
    assert (answers["count"], answers["distinct"]) == (13, 6)
    assert answers["most_frequent"][:2] == [("no", 6), ("yes", 3)]
    assert facts["first_words"] == {"count": 11, "distinct": 2, "most_frequent": [("is it", 9), ("what is", 2)]}
    measures = {"count": 11, "mean": 17.09, "least": 13, "5%": 13, "median": 18, "95%": 18, "most": 18}
    assert facts["lengths"]["question, characters"] == measures
    rows = facts["lengths"]["row, tokens"]
    encoded = processor.encode_conversation(load_samples(data)[0][0].messages)
    assert rows["count"] == 12 and rows["least"] <= len(encoded.input_ids) <= rows["most"]
    assert (facts["width"]["count"], facts["width"]["least"], facts["width"]["most"]) == (5, 40, 80)
    assert (facts["aspect"]["least"], facts["aspect"]["median"], facts["aspect"]["most"]) == (0.333, 1.0, 2.0)
    assert facts["near_duplicates"] == {"left_out": 0, "still_there": 1}
    json.dumps(facts)


def test_pairs_are_shown_whether_they_were_left_out_or_not(data: DataSettings, processor: Any) -> None:
    ((kept, other, how),) = described(data, processor).pairs
    assert (kept.id, other.id) == ("asked/0", "asked/9") and how.startswith(
        "still there: picture nearly equals another"
    )
    data.filters = {"duplicate_images": {}, "duplicate_texts": {}, "readable_images": {}}
    report = described(data, processor)
    assert report.facts["near_duplicates"] == {"left_out": 4, "still_there": 0}
    assert report.facts["left_out"]["text nearly equals another"]["count"] == 3
    assert report.facts["left_out"]["a picture cannot be opened"]["first"][0].startswith("asked/10 (")
    assert {how.split(":")[0] for _, _, how in report.pairs} == {"left out"} and len(report.pairs) == 4


def test_the_page_holds_everything_and_needs_nothing(data: DataSettings, processor: Any, tmp_path: Path) -> None:
    augmenter = Augmenter(build_parts(AUGMENTATIONS, {"flip": {"probability": 1.0}}, "data.augment"))
    data.filters = {"duplicate_images": {}}
    report = described(data, processor, augmenter)
    page = report_page.write(
        tmp_path / "out", report, title="A & B", style="p{margin:0}", command="eyespot data <report>", max_length=30
    )
    text = page.read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["samples"] == report.facts["samples"] == 10
    for words in (
        "A &amp; B", "10 samples about 4 different pictures; 2 records were left out", "eyespot data &lt;report&gt;",
        "picture nearly equals another", "a picture cannot be opened", "p{margin:0}", "flip may change 10 of 10",
        "Is it on the left? / no", "Is it on the right? / no",
        '<td class="n">20.0%</td>', "a &lt;b&gt;picture&lt;/b&gt;",
    ):  # fmt: skip
        assert words in text, words
    assert "<script" not in text and not re.search(r"""(?:src|href)=["'](?!data:)""", text)
    pictures = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', text)
    assert text.count('class="chart"') == 5
    # charts, one pair, and for four visits the picture and four draws
    assert len(pictures) == 5 + 2 + 4 * 5


def test_a_data_set_without_pictures_or_words_has_a_page(processor: Any, tmp_path: Path) -> None:
    samples = [Sample.question("$x", (), "$1 or $2?", "$"), Sample.question("y", (), "?", "\u4e00" * 200)]
    report = describe(samples, LoadReport(2), DataSettings({"format": "vqa"}), processor)
    assert report.facts["samples_without_picture"] == 2 and report.facts["width"] == {}
    text = report_page.write(tmp_path, report, title="t", style="").read_text()
    assert "2 samples have no picture" in text and "Pictures" not in text and "Sources" not in text


def test_without_matplotlib_the_extra_is_named(
    data: DataSettings, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"eyespot\[pictures\]"):
        report_page.write(tmp_path, described(data, processor), title="t", style="")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    settings = ["recipe=smoke", "data.limit=30", "data.filters={text_length: {max_chars: 8}}"]
    assert main(["data", "report", *settings, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((out / "report.json").read_text())
    assert facts["samples"] < 30 and f"{facts['samples']} accepted, {30 - facts['samples']} rejected" in printed
    assert len((out / "dropped.jsonl").read_text().splitlines()) == 30 - facts["samples"]
    first = re.search(r'<img class="chart" src="data:image/png;base64,([^"]+)"', (out / "report.html").read_text())
    assert first is not None
    chart = Image.open(io.BytesIO(base64.b64decode(first[1])))
    assert chart.width > 1000 and chart.getextrema()[3] == (0, 255)  # drawn on nothing, so that a dark page stays dark
    assert main(["data", "report", "recipe=smoke", "data.filters={text_lenght: {}}"]) == 2
    assert "did you mean 'text_length'?" in capsys.readouterr().err


def test_docs_name_what_there_is() -> None:
    """The settings at the head of docs/data.md are accepted, and its tables name every filter and augmentation."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    values = yaml.safe_load(block[1])["data"]
    settings = from_dict(DataSettings, values, "data")
    check_mixture(settings.train)
    build_parts(FILTERS, settings.filters, "data.filters")
    build_parts(AUGMENTATIONS, settings.augment, "data.augment")
    assert settings.filters and settings.augment
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(named) == sorted([*FILTERS, *AUGMENTATIONS])
    for name, registry in [*((n, FILTERS) for n in FILTERS), *((n, AUGMENTATIONS) for n in AUGMENTATIONS)]:
        (row,) = re.findall(rf"^\| `{name}` \| (.*?) \|", text, re.MULTILINE)
        assert all(f"`{option}`" in row for option in inspect.signature(registry[name]).parameters), name
