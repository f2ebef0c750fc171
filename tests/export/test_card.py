"""The model card says what the record says, and what it does not say is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from eyespot.config import sources_of, stage_settings, to_dict
from eyespot.export.card import read_record, write_card
from eyespot.export.licences import Part, Terms, data_of, public_name, strictest, weights_of
from eyespot.training.run import choices, compose_settings
from shipped import ORIGIN, write_run

pytestmark = pytest.mark.filterwarnings("ignore:.*HF_HUB.*")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def card(run: Path) -> ModelCard:
    return ModelCard(write_card(read_record(run), "me/shapes"))


def test_metadata_names_licence_parts_and_task(card: ModelCard) -> None:
    data = card.data
    assert (data.license, data.pipeline_tag, data.library_name) == ("gemma", "image-text-to-text", "eyespot")
    assert data.base_model == ["google/gemma-3-270m"]
    assert "vision-language-model" in data.tags


def test_metadata_has_the_score_beside_its_controls(run: Path, card: ModelCard) -> None:
    report = json.loads((run / "report.json").read_text())
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {
        "accuracy": round(report["accuracy"], 4),
        "accuracy, blind control": round(report["controls"]["blind"]["accuracy"], 4),
        "accuracy, shuffled control": round(report["controls"]["shuffled"]["accuracy"], 4),
    }
    assert {result.dataset_type for result in card.data.eval_results} == {"easy_vqa"}


def test_scores_have_intervals_controls_and_the_verdict(run: Path, card: ModelCard) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["verdict"].startswith("sees: ") and f"**Verdict of its evaluation: {report['verdict']}**" in card.text
    low, high = (100 * bound for bound in report["interval"])
    assert f"| with its picture | {100 * report['accuracy']:.1f} [{low:.1f}, {high:.1f}] |  |" in card.text
    worth = [100 * report["differences"]["blind"][key] for key in ("difference", "low", "high")]
    assert f"{worth[0]:.1f} [{worth[1]:.1f}, {worth[2]:.1f}] |" in card.text


def test_kinds_that_need_no_picture_are_named_as_limits(card: ModelCard) -> None:
    limits = card.text.partition("## Limits")[2]
    assert "Questions of kind *weather*: 100.0% with the picture, 100.0% without" in limits
    assert "*colour*" not in limits


def test_how_to_repeat_and_to_use_it(card: ModelCard) -> None:
    for text in (ORIGIN["command"], ORIGIN["git_commit"], ORIGIN["versions"], ORIGIN["hardware"], "10.0 minutes"):
        assert text in card.text
    assert 'eyespot.load("me/shapes")' in card.text and "eyespot download me/shapes" in card.text
    assert "![Answers before and after training](before_after.png)" in card.text


def test_parts_and_data_with_their_terms(card: ModelCard) -> None:
    assert "| language model | google/gemma-3-270m | gemma, https://ai.google.dev/gemma/terms |" in card.text
    assert "| vision encoder | EfficientNet-Lite (ImageNet) | apache-2.0, https://github.com/tensorflow" in card.text
    assert "| training | easy_vqa | mit, https://github.com/vzhou842/easy-VQA |  |" in card.text


def test_stages_are_told_apart_and_pictures_credited(tmp_path: Path) -> None:
    stages = [
        {"stage": name, "train": {"vision": "frozen", "connector": "full"}, "steps": 10, "samples": 80, "seconds": 60.0,
         "curve": [[10, 0.5]]}
        for name in ("detect", "look")
    ]  # fmt: skip
    card = ModelCard(write_card(read_record(write_run(tmp_path, "scenes", stages=stages)), "me/scenes"))
    assert "| look | connector: full | 10 | 80 | 1.0 minutes | 0.500 |" in card.text
    assert "OpenMoji" in card.text and "cc-by-sa-4.0" in card.text


def test_a_model_that_was_not_evaluated_says_so(tmp_path: Path) -> None:
    warning = {"step": 5, "kind": "sight", "text": "no sign that the model uses the picture"}
    run = write_run(tmp_path, evaluated=False, warnings=[warning])
    card = ModelCard(write_card(read_record(run / "model"), "me/x"))
    assert "**It was not evaluated**" in card.text and "## Scores" not in card.text
    assert card.data.eval_results is None
    assert "Warning while it trained: no sign that the model uses the picture." in card.text


def test_what_any_stage_learned_from_is_named(tmp_path: Path) -> None:
    """Also if only a later stage has data of its own."""
    record = read_record(write_run(tmp_path, "qformer_two_stage", evaluated=False))
    names = [part.name for part in record.data if part.role == "training"]
    assert any("558k" in name for name in names) and any("instruct_150k" in name for name in names)
    url = {"path": "llava_instruct_150k.json", "image_url": "http://images.cocodataset.org/train2017/"}
    assert [part.name for part in data_of([("training", url)])] == ["llava_instruct_150k.json", "train2017"]


def test_preferences_are_part_of_the_story(tmp_path: Path) -> None:
    command = "eyespot prefer runs/quickstart/model pairs.json"
    later = {"data": "/home/me/pairs.json", "lr": 1e-6, "beta": 0.1, "losses": [0.7] * 20, "margins": [],
             "origin": {"command": command}}  # fmt: skip
    text = write_card(read_record(write_run(tmp_path, preference=later)), "me/x")
    assert "20 steps of preference learning (DPO, learning rate 1e-06, beta 0.1)" in text
    assert f"{ORIGIN['command']}\n{command}" in text
    assert "| training | pairs.json | not known here |" in text and ORIGIN["hardware"] in text


def test_scores_are_those_of_the_questions_that_were_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    report = json.loads((run / "report.json").read_text())
    source = {"benchmark": "pope", "path": "/data/coco_pope_random.json"}
    report["settings"] = {**report.get("settings", {}), "source": source}
    (run / "report.json").write_text(json.dumps(report))
    card = ModelCard(write_card(read_record(run), "me/x"))
    assert {result.dataset_name for result in card.data.eval_results or ()} == {"coco_pope_random.json"}
    assert {result.dataset_split for result in card.data.eval_results or ()} == {None}


def test_weights_are_named_only_where_they_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(vision: dict[str, Any], language: dict[str, Any]) -> list[str]:
        return [
            part.name for part in weights_of({"vision": vision, "connector": {"name": "mlp"}, "language": language})
        ]

    scratch = {"name": "efficientnet_lite", "args": {"pretrained": False}}
    other = {"name": "gguf", "args": {"source": "/data/gemma-runs/Qwen2-0.5B.gguf"}}
    assert named(scratch, other) == ["Qwen2-0.5B.gguf"]
    (tmp_path / "models" / "clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    clip = {"name": "pretrained", "args": {"source": "models/clip"}}
    assert named(clip, {"name": "gguf"}) == ["clip", "google/gemma-3-270m"]


def test_a_record_without_settings_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "model" / "training.json").write_text('{"preference": {}}')
    with pytest.raises(ValueError, match="holds no settings: what the model was made of is not known"):
        read_record(run)


def test_a_licence_is_chosen_only_where_no_weights_have_one(run: Path, tmp_path: Path) -> None:
    own = read_record(write_run(tmp_path, "scratch_tiny", evaluated=False))
    assert ModelCard(write_card(own, "me/x")).data.license is None
    assert "no licence was chosen" in write_card(own, "me/x")
    assert ModelCard(write_card(own, "me/x", "mit")).data.license == "mit"
    with pytest.raises(ValueError, match="--license is 'mit', but the model is made of weights under 'gemma'"):
        write_card(read_record(run), "me/x", "mit")


def test_folders_without_a_record_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; give the folder of a finished run"):
        read_record(tmp_path)


def test_the_strictest_terms_are_those_of_the_whole() -> None:
    parts = [
        Part("a", "a", Terms("apache-2.0", "")),
        Part("b", "b", Terms("gemma", "")),
        Part("c", "c", Terms("mit", "")),
    ]
    assert strictest(parts) == Terms("gemma", "")
    unknown = strictest([*parts, Part("d", "me/strange", None)])
    assert unknown is not None and unknown.name == "other" and "me/strange are not known" in unknown.note
    assert strictest([]) is None


@pytest.mark.parametrize(
    ("source", "name"),
    [("google/x", "google/x"), ("/home/me/models/x", "x"), ("./x", "x"), ("~/a/b.json", "b.json"), ("C:/a/b", "b")],
)
def test_names_of_this_machine_stay_here(source: str, name: str) -> None:
    assert public_name(source) == name


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_the_terms_of_all_that_the_recipes_use_are_known(recipe: str) -> None:
    settings = compose_settings([f"recipe={recipe}"])
    own = [settings, *(stage_settings(settings, i) for i in range(len(settings.stages or [])))]
    sources: list[tuple[str, Any]] = [
        ("training", source) for one in own for source in sources_of(one.data.train).values()
    ]
    parts = [*weights_of(to_dict(settings.model)), *data_of(sources)]
    unknown = [part.name for part in parts if part.terms is None]
    # folders of photographs that several sources share
    assert [name for name in unknown if not name.endswith(("llava_mix", "images"))] == []
