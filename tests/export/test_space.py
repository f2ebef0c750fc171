"""A Space carries its code and its model, and goes nowhere if the model does not look at pictures."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import eyespot
from eyespot.data.sample import Sample
from eyespot.export import push as pushing
from eyespot.export import space
from eyespot.export.card import read_record
from eyespot.export.push import push
from eyespot.export.sensitivity import NotSensitive, Sensitivity, measure, read_questions, write_questions
from eyespot.export.space import check_bundle, choose, make_bundle, may_be_shown
from eyespot.inference import Assistant
from shipped import COLOURS, questions, tiny_model, write_run

gradio = pytest.importorskip("gradio")
pytestmark = pytest.mark.usefixtures("left_behind")
ROOT = Path(__file__).parents[2]


def asked() -> list[Sample]:
    """What colour every picture has."""
    return [sample for sample in questions() if sample.kind == "colour"]


def blinded(assistant: Assistant) -> Assistant:
    with torch.no_grad():
        for parameter in assistant.model.connector.parameters():
            parameter.zero_()
    assistant.forget()
    return assistant


def test_a_model_that_sees_passes_and_its_blinded_self_does_not() -> None:
    assistant = tiny_model()
    found = measure(assistant, samples := asked())
    found.check()
    assert found.changed > 6 and found.likelier > 6 * found.less_likely
    dark = measure(blinded(assistant), samples)
    assert (dark.changed, dark.likelier, dark.less_likely) == (0, 0, 0)
    with pytest.raises(NotSensitive, match="does not look at pictures: of 12 answers 0 are others"):
        dark.check()


def test_answers_that_change_for_no_reason_are_no_sight() -> None:
    """Other pictures get other answers, but the truth is no likelier beside its own picture."""
    assistant = tiny_model()
    samples = asked()
    wrong = [dataclasses.replace(a, images=b.images) for a, b in zip(samples, samples[1:] + samples[:1], strict=True)]
    found = measure(assistant, wrong)
    assert found.changed > 0
    with pytest.raises(NotSensitive):
        found.check()


def test_few_pictures_prove_nothing() -> None:
    with pytest.raises(ValueError, match="the questions are about 2 pictures, 8 are needed"):
        measure(tiny_model(), questions()[:4])


def test_questions_survive_the_way_to_another_process(tmp_path: Path) -> None:
    samples = asked()
    write_questions(samples, tmp_path / "questions")
    back = read_questions(tmp_path / "questions")
    assert [(s.messages, s.group) for s in back] == [(s.messages, s.group) for s in samples]
    for sample, other in zip(samples, back, strict=True):
        with Image.open(str(other.images[0])) as picture:
            assert picture.tobytes() == sample.images[0].tobytes()  # type: ignore[union-attr]


def test_questions_are_about_different_pictures() -> None:
    chosen = choose(questions(), 5)
    assert len(chosen) == 5 == len({sample.group for sample in chosen})
    assert len(choose(questions())) == len(COLOURS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def bundle(run: Path, tmp_path: Path) -> Path:
    items = make_bundle(read_record(run), "me/space", tmp_path / "bundle", choose(questions()))
    assert [item for item in items if item.refused] == []
    return tmp_path / "bundle"


def test_the_bundle_has_page_code_model_and_examples(bundle: Path) -> None:
    header = yaml.safe_load((bundle / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio" and header["sdk_version"] == gradio.__version__
    assert header["app_file"] == "app.py" and header["title"] == "space" and header["license"] == "gemma"
    assert len((bundle / "app.py").read_text().splitlines()) == 3
    assert (bundle / "eyespot" / "configs" / "recipe" / "quickstart.yaml").is_file()
    assert not list(bundle.rglob("__pycache__"))
    assert "Apache License" in (bundle / "eyespot" / "LICENSE").read_text()
    card = (bundle / "model" / "README.md").read_text()
    assert 'eyespot.load("model")' in card and "eyespot download" not in card
    for name, question in json.loads((bundle / "page.json").read_text())["examples"]:
        with Image.open(bundle / name) as picture:
            assert picture.size == (16, 16) and question
    assert eyespot.load(bundle / "model", "cpu").ask([], "hm?", max_new_tokens=2) is not None


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ({"format": "easy_vqa", "split": "test"}, True),
        ({"format": "scenes", "num_scenes": 5}, True),
        ({"format": "captions", "path": "jxie/flickr8k"}, False),
        ({"format": "vqa", "path": "questions.jsonl"}, False),
    ],
)
def test_pictures_stay_at_home_unless_their_terms_are_known(source: dict[str, Any], shown: bool) -> None:
    assert may_be_shown(source) is shown


def test_what_is_refused_in_the_model_is_refused_in_the_bundle(run: Path, tmp_path: Path) -> None:
    (run / "model" / "optimizer.bin").write_bytes(b"x")
    (run / "model" / "notes.json").write_text('["see /home/me/x.png"]')
    items = make_bundle(read_record(run), "me/space", tmp_path / "bundle", ())
    assert {item.path for item in items if item.refused} == {"model/optimizer.bin", "model/notes.json"}
    assert len(items) == len({item.path for item in items})
    assert json.loads((tmp_path / "bundle" / "page.json").read_text()) == {"title": "space", "examples": []}


def test_requirements_are_those_of_the_package() -> None:
    """But for torch and transformers, which stay as they were when the bundle was checked."""
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (space.TEMPLATE / "requirements.txt").read_text().splitlines()
    kept = [line for line in lines if "{" not in line and not line.startswith("--")]
    pinned = {re.match(r"\w+", line).group() for line in lines if "{" in line}  # type: ignore[union-attr]
    assert pinned == {"torch", "transformers", "gradio"}
    assert sorted(kept) == sorted(line for line in core if re.match(r"\w+", line).group() not in pinned)  # type: ignore[union-attr]


def test_the_page_gets_model_and_examples(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eyespot.serving import page

    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr(page, "launch", lambda models, title, examples: calls.append((models, examples)))
    space.show(bundle)
    ((models, examples),) = calls
    assert models == {"space": bundle / "model"} and [path.is_file() for path, _ in examples] == [True] * 4
    called = [node for node in ast.walk(ast.parse((bundle / "app.py").read_text())) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in called] == ["show('.')"]


def test_the_bundle_asks_its_own_model_with_its_own_code(bundle: Path) -> None:
    """A fresh process, in which the repository is nowhere to be found."""
    found = check_bundle(bundle, asked())
    assert Path(found.code) == bundle / "eyespot" and found.likelier > found.less_likely
    assert json.loads((bundle / "sensitivity.json").read_text())["likelier"] == found.likelier
    assert not list(bundle.rglob("__pycache__")) and not list(bundle.parent.glob("*-questions"))


def test_a_space_that_does_not_look_is_not_pushed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself is tested above; here it finds what it finds in a blinded model."""

    def look(folder: Path, samples: Sequence[Sample]) -> Sensitivity:
        dark = measure(blinded(eyespot.load(folder / "model", "cpu")), samples)
        dark.check()
        return dark

    monkeypatch.setattr(pushing, "load_test", lambda source: (None, questions()))
    monkeypatch.setattr(pushing, "check_bundle", look)
    with pytest.raises(NotSensitive):
        list(push(run, "me/space", space=True, yes=True, out=tmp_path / "kept", api=object()))  # type: ignore[arg-type]
    assert not (tmp_path / "kept").exists()


def looks(folder: Path, _: Any) -> Sensitivity:
    (folder / "sensitivity.json").write_text("{}")
    return Sensitivity(12, 9, 8, 1, 0.2, 0.9, "x")


def test_a_space_that_looks_is_pushed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(pushing, "load_test", lambda source: (None, questions()))
    monkeypatch.setattr(pushing, "check_bundle", looks)
    monkeypatch.setattr(pushing, "upload", lambda folder, repo, **how: calls.append({"repo": repo, **how}) or "there")
    lines = list(push(run, "me/space", space=True, yes=True))
    assert any("sensitivity.json" in line for line in lines)
    assert lines[-1] == "pushed: there"
    assert [(call["repo"], call["kind"]) for call in calls] == [("me/space", "space")]
    assert any("it looks at pictures: of 12 answers 9 are others" in line for line in lines)
