"""Two evaluations side by side: numbers against the plain measures, what is refused, and what is shown."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from eyespot.cli import main
from eyespot.evaluation.benchmarks.base import Questions, Reference, Scored
from eyespot.evaluation.compare import Comparison, compare
from eyespot.evaluation.compare_page import show, write_page
from eyespot.evaluation.metrics import cluster_bootstrap, paired_bootstrap, paired_test
from eyespot.evaluation.runner import evaluate


class Told:
    """Gives the answers of a list, in the order of the questions."""

    def __init__(self, samples: Sequence[Any], answers: Sequence[str]) -> None:
        self.known = {
            (sample.images, sample.messages[0]["content"][-1]["text"]): answer
            for sample, answer in zip(samples, answers, strict=True)
        }

    def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
        return [self.known[tuple(images), messages[-1]["content"][-1]["text"]] for images, messages in conversations]


def write(folder: Path, samples: Sequence[Any], answers: Sequence[str], **options: Any) -> Path:
    evaluate(Told(samples, answers), samples, name=folder.name, controls=(), **options).write(folder)
    return folder


@pytest.fixture
def asked(fakes: SimpleNamespace) -> list[Any]:
    """Two questions about each of 40 pictures, of two kinds."""
    kinds = {"a": "colour", "b": "presence"}
    return [replace(sample, kind=kinds[sample.id[-1]]) for sample in fakes.samples()]


@pytest.fixture
def folders(asked: list[Any], tmp_path: Path) -> tuple[Path, Path]:
    """B knows every colour and A each second one; A is right about every presence and B about all but one in ten."""
    truths = [sample.answers[0] for sample in asked]
    a = ["[b]?" if i % 4 == 0 else truth for i, truth in enumerate(truths)]
    b = ["" if i % 20 == 1 else truth for i, truth in enumerate(truths)]
    return write(tmp_path / "a", asked, a), write(tmp_path / "b", asked, b)


def shown(comparison: Comparison) -> str:
    text = io.StringIO()
    show(comparison, Console(file=text, width=100))
    return text.getvalue()


def test_numbers_are_those_of_the_plain_measures(asked: list[Any], folders: tuple[Path, Path]) -> None:
    found = compare(*folders)
    a = [float(i % 4 != 0) for i in range(80)]
    b = [float(i % 20 != 1) for i in range(80)]
    pictures = [sample.group for sample in asked]
    overall = found.overall
    assert (overall.num_questions, found.num_pictures, found.measure) == (80, 40, "accuracy")
    assert (overall.a.accuracy, overall.b.accuracy) == (0.75, 0.95)
    assert overall.a.interval == cluster_bootstrap(a, pictures)
    assert (overall.difference, *overall.interval) == paired_bootstrap(b, a, pictures)
    assert overall.p_value == paired_test(b, a, pictures) < 0.01
    assert overall.outcomes == {"both right": 56, "only A right": 4, "only B right": 20, "both wrong": 0}
    assert list(found.by_kind) == ["colour", "presence"]
    colour, presence = found.by_kind.values()
    assert (colour.difference, presence.difference) == (0.5, -0.1)
    assert colour.p_value == paired_test(b[::2], a[::2], pictures[::2])
    assert (colour.better, presence.better, overall.better) == ("B", "", "B")
    low, high = (100 * end for end in overall.interval)
    assert overall.line == f"B is better: +20.0 points [{low:.1f}, {high:.1f}], {overall.p_text}"
    assert presence.line.startswith("no difference that 40 questions can show: -10.0 [")


def test_the_other_way_round_everything_is_turned(folders: tuple[Path, Path]) -> None:
    there, back = compare(*folders), compare(*folders[::-1])
    assert back.overall.difference == -there.overall.difference
    assert back.overall.interval == pytest.approx([-end for end in reversed(there.overall.interval)])
    assert back.overall.p_value == there.overall.p_value
    assert back.overall.line.startswith("B is worse: -20.0 points [-")
    assert list(back.overall.outcomes.values()) == [56, 20, 4, 0]


def test_an_evaluation_does_not_differ_from_itself(folders: tuple[Path, Path]) -> None:
    found = compare(folders[0], folders[0])
    assert found.overall.line == "no difference that 80 questions can show: +0.0 [0.0, 0.0], p = 1"
    assert found.num_differing == 0 and found.differing == () and found.settings == {}


def test_questions_of_one_only_are_left_out_and_named(asked: list[Any], tmp_path: Path) -> None:
    truths = [sample.answers[0] for sample in asked]
    a = write(tmp_path / "a", asked[:30], truths[:30])
    b = write(tmp_path / "b", asked[10:20][::-1] + asked[20:], (truths[10:20][::-1] + truths[20:]))
    found = compare(a, b)
    assert found.overall.num_questions == 20 and found.overall.a.accuracy == found.overall.b.accuracy == 1
    assert found.only_in_a == tuple(sample.id for sample in asked[:10])
    assert found.only_in_b == tuple(sample.id for sample in asked[30:])
    assert "10 questions only A was asked: 0-a, 0-b, 1-a, 1-b, 2-a and 5 more" in shown(found)


def test_untrained_against_trained(asked: list[Any], folders: tuple[Path, Path]) -> None:
    few = asked[:12]
    write(folders[1] / "before", few, ["?"] * 12)
    found = compare(folders[1] / "before", folders[1])
    assert found.overall.num_questions == 12 and found.overall.better == "B"
    assert (found.only_in_a, len(found.only_in_b)) == ((), 68)


def test_differing_questions_come_by_how_much_they_differ(folders: tuple[Path, Path]) -> None:
    found = compare(*folders)
    assert (found.num_differing, len(found.differing)) == (24, 12)
    assert [one.id for one in found.differing[:3]] == ["0-a", "0-b", "2-a"]
    first = found.differing[0]
    assert (first.answers, first.a, first.b, first.score_a, first.score_b) == (("red",), "[b]?", "red", 0.0, 1.0)


class Length(Questions):
    """The number of letters, up to ten."""

    measure = "length"
    limit = 10.0

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        return Scored([float(min(len(text), 10)) for text in texts])


def test_scores_with_another_limit(asked: list[Any], tmp_path: Path) -> None:
    said = ["x" * (i % 3) for i in range(80)]
    more = [text + "yy" * (i % 2) for i, text in enumerate(said)]
    a = write(tmp_path / "a", asked, said, benchmark=Length())
    b = write(tmp_path / "b", asked, more, benchmark=Length())
    found = compare(a, b)
    assert found.overall.b.accuracy == pytest.approx(np.mean([len(text) for text in more]))
    assert found.overall.difference == pytest.approx(1.0) and found.overall.outcomes == {}
    assert found.overall.line.startswith("B is better: +100.0 points [")
    assert "both right" not in shown(found)
    assert "Right and wrong" not in write_page(tmp_path, found).read_text()


def test_other_settings_are_told(asked: list[Any], tmp_path: Path) -> None:
    truths = [sample.answers[0] for sample in asked]
    a = write(tmp_path / "a", asked, truths, max_new_tokens=8)
    b = write(tmp_path / "b", asked, truths)
    found = compare(a, b)
    assert found.settings == {"max_new_tokens": (8, 16)}
    assert "What else differs" in write_page(tmp_path, found).read_text()


def test_what_cannot_be_compared_is_said(asked: list[Any], folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = folders
    truths = [sample.answers[0] for sample in asked]
    with pytest.raises(ValueError, match=r"nowhere' has no report\.json; give a run, or what eyespot evaluate --out"):
        compare(a, tmp_path / "nowhere")
    retrieval = tmp_path / "retrieval"
    retrieval.mkdir()
    (retrieval / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no predictions\.jsonl"):
        compare(retrieval, a)
    with pytest.raises(
        ValueError, match=r"is measured by accuracy up to 1 and .* by length up to 10; evaluate both on"
    ):
        compare(a, write(tmp_path / "length", asked, truths, benchmark=Length()))
    strangers = [replace(sample, id=f"new {sample.id}") for sample in asked]
    with pytest.raises(ValueError, match="have 0 questions in common; evaluate both on the same data"):
        compare(a, write(tmp_path / "other", strangers, truths))
    false = [replace(sample, answers=("pink",)) if sample.id == "3-a" else sample for sample in asked]
    with pytest.raises(ValueError, match=r"1 of 80 questions have other true answers .* '3-a' \('teal' and 'pink'\)"):
        compare(a, write(tmp_path / "false", false, truths))


def test_the_terminal_shows_scores_counts_and_the_result(folders: tuple[Path, Path]) -> None:
    found = compare(*folders)
    lines = shown(found).splitlines()
    assert lines[:3] == [f"A: {folders[0]}", f"B: {folders[1]}", "accuracy of 80 questions about 40 pictures"]
    assert re.search(r"^all +80 +75\.0% +95\.0% +\+20\.0 ", "\n".join(lines), re.MULTILINE)
    assert "both right 56, only A right 4, only B right 20, both wrong 0" in lines
    assert sum("[b]?" in line for line in lines) > 5  # not taken for bold
    assert lines[-1] == found.overall.line


def test_the_page_is_whole_and_safe(folders: tuple[Path, Path], asked: list[Any], tmp_path: Path) -> None:
    truths = [sample.answers[0] for sample in asked]
    evil = write(tmp_path / "<i>", asked, ["<script>alert(1)</script>", *truths[1:]])
    page = write_page(tmp_path / "out", compare(evil, folders[1]), "eyespot compare '<i>' b").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;i&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('<li class="card">') == 5 and "prefers-color-scheme:dark" in page
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["comparison.html"]


def test_the_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, folders)
    assert main(["compare", a, b, "--out", str(tmp_path / "out")]) == 0
    found = compare(a, b)
    assert capsys.readouterr().out.splitlines()[-2:-1] == [found.overall.line]
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["line"] == found.overall.line and report["overall"]["outcomes"]["only B right"] == 20
    assert report["by_kind"]["colour"]["p_value"] == found.by_kind["colour"].p_value
    assert len(report["differing"]) == 12 and report["only_in_a"] == []
    assert f"eyespot compare {a} {b}" in (tmp_path / "out" / "comparison.html").read_text()
    assert main(["compare", a, str(tmp_path)]) == 2
    assert "has no report.json" in capsys.readouterr().err
