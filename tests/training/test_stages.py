"""Several trainings in one run: what each learns, where it starts, and that a stop at any point changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eyespot
from drawn import draw_captions
from eyespot.compose import load_parts
from eyespot.config import ConfigError
from eyespot.evaluation.retrieval import measure_retrieval
from eyespot.inference import Assistant
from eyespot.training.align_module import uniform
from eyespot.training.run import Run, compose_settings, finished_run, train
from started import Started

pytestmark = pytest.mark.filterwarnings("ignore")

COMMON = ["recipe=smoke", "data.test=null", "data.limit=null", "data.validation_share=0.2", "evaluation.run=false",
          "trainer.checkpoint_every=2", "trainer.log_every=1", "trainer.epochs=3", "trainer.num_samples=1",
          "trainer.lr={vision: 2e-3, connector: 2e-3, language: 2e-3, alignment: 2e-3}",
          "model.language.lora={r: 2, alpha: 4, targets: all-linear, dropout: 0.1}"]  # fmt: skip
SIDES = {
    "qformer": [
        "connector=qformer",
        "model.connector.args={num_queries: 4, hidden_dim: 32, depth: 2, heads: 2, dropout: 0.1}",
        "model.alignment={dim: 16, max_text: 24, tokenizer: 'bpe:280'}",
    ],
    "language": ["model.alignment={dim: 16, max_text: 24}", "model.language.tokenizer='bpe:280'"],
}
# each of another length, so that a line about a step tells the stage
JOINT = "{name: joint, kind: joint, train: {vision: full, connector: full, alignment: full}, trainer: {max_steps: 3}}"
ALIGN = "{name: align, kind: align, train: {connector: full}, trainer: {max_steps: 4}}"
TALK = (
    "{name: talk, kind: instruct, train: {connector: full, language: lora}, "
    "trainer: {max_steps: 5, lr: {language: 1e-3}}}"
)
THREE = f"stages=[{JOINT}, {ALIGN}, {TALK}]"

Staged = Callable[..., Run]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_captions(tmp_path_factory.mktemp("drawn"))


def words(drawn: Path, folder: Path, name: str, side: str, *overrides: str) -> list[str]:
    source = f"data.train={{format: captions, path: {drawn}}}"
    return [*COMMON, source, *SIDES[side], THREE, f"name={name}", f"output_dir={folder}", *overrides]


@pytest.fixture
def staged(drawn: Path, tmp_path: Path) -> Staged:
    """``staged("name", "qformer", "trainer...=...")`` runs joint, align and talk quietly."""

    def start(name: str, side: str, *overrides: str, **options: Any) -> Run:
        settings = compose_settings(words(drawn, tmp_path, name, side, *overrides))
        with Path(os.devnull).open("w") as nowhere:
            return train(settings, measure=measure_retrieval, console=Console(file=nowhere), **options)

    return start


@pytest.fixture(scope="module", params=list(SIDES))
def whole(request: pytest.FixtureRequest, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of three stages, and in untrained.safetensors beside it the model before them; tests read
    both and never change them."""
    folder = tmp_path_factory.mktemp("runs")

    def keep(assistant: Assistant) -> None:
        save_file({n: p.clone() for n, p in assistant.model.named_parameters()}, folder / "untrained.safetensors")

    settings = compose_settings(words(drawn, folder, "whole", request.param))
    with Path(os.devnull).open("w") as nowhere:
        return train(settings, measure=measure_retrieval, before_training=keep, console=Console(file=nowhere))


def side_of(run: Run) -> str:
    return run.settings.model.connector.name if run.settings.model.connector.name == "qformer" else "language"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same_bits(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    records = [json.loads((folder / "model" / "training.json").read_text()) for folder in (one, other)]
    for mine, others in zip(*(record["stages"] for record in records), strict=True):
        for key in ("curve", "validation", "retrieval", "steps", "samples"):
            assert mine.get(key) == others.get(key), (mine["stage"], key)


def last(folder: Path, stage: str) -> Path:
    return sorted((folder / "stages" / stage / "checkpoints").iterdir())[-1]


def copied(run: Run, folder: Path) -> Path:
    """The run's folder under the output folder of this test, as if it had been made there."""
    target = folder / "whole"
    shutil.copytree(run.folder, target)
    for file in target.rglob("settings.json"):
        file.write_text(file.read_text().replace(str(run.folder.parent), str(folder)))
    return target


# --- what a run leaves -------------------------------------------------------------------------------------------


def test_every_stage_trains_what_it_says_and_starts_where_the_last_one_ended(whole: Run) -> None:
    states = [load_parts(last(whole.folder, name))[0].state_dict() for name in ("0-joint", "1-align", "2-talk")]
    untrained = load_file(whole.folder.parent / "untrained.safetensors")
    learned = [
        {name for name in untrained if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise([untrained, *states])
    ]
    parts = [{name.partition(".")[0] for name in names} for names in learned]
    assert parts == [{"vision", "connector", "alignment"}, {"connector"}, {"connector", "language"}]
    assert all("lora_" in name for name in learned[2] if name.startswith("language."))
    assert not any(".text" in name for name in learned[1] | learned[2])  # a text side waits
    final = weights(whole.folder)
    assert all(torch.equal(final[name], states[2][name]) for name in final)


def test_the_record_tells_of_all_stages(whole: Run) -> None:
    record = json.loads((whole.folder / "model" / "training.json").read_text())
    assert [stage["stage"] for stage in record["stages"]] == ["joint", "align", "talk"]
    assert record["steps"] == whole.steps == 12 == sum(stage["steps"] for stage in record["stages"])
    assert record["stages"][0]["losses"] == {"contrastive": 1.0, "matching": 1.0, "caption": 1.0}
    assert record["stages"][2]["train"]["language"] == "lora" and record["stages"][1]["losses"] == {}
    assert record["settings"]["stages"][1]["kind"] == "align"
    joint = whole.folder / "stages" / "0-joint"
    assert record["stages"][0]["retrieval"] == json.loads((joint / "retrieval.json").read_text())
    assert set(record["stages"][0]["retrieval"]["image_to_text"]) == {"recall@1", "recall@5", "recall@10"}
    assert not list(whole.folder.glob("stages/[12]*/retrieval.json"))
    header = (joint / "logs" / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/contrastive", "train/matching", "train/caption", "train/scale", "val/matching"} <= set(header)
    assert not (joint / "samples.jsonl").exists() and not list(whole.folder.rglob(".partial*"))


def test_pictures_are_brought_to_the_size_of_words_once(whole: Run) -> None:
    scales = [
        json.loads((last(whole.folder, name) / "config.json").read_text())["image_scale"]
        for name in ("0-joint", "1-align", "2-talk")
    ]
    assert scales[1] == scales[2] != 1.0
    # the Q-Former's own stage does not show the language model any picture
    assert (scales[0] == 1.0) == (side_of(whole) == "qformer")


def test_a_checkpoint_of_a_later_stage_is_whole_wherever_it_is(whole: Run, tmp_path: Path) -> None:
    shutil.copytree(last(whole.folder, "2-talk"), tmp_path / "alone")
    model, processor = load_parts(tmp_path / "alone")
    for name, tensor in weights(whole.folder).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    ours, theirs = processor.encode_texts(["a red cat"]), load_parts(whole.model_folder)[1].encode_texts(["a red cat"])
    assert torch.equal(ours["text_ids"], theirs["text_ids"])
    # what this stage trains is written anew, what others trained is linked
    with safe_open(tmp_path / "alone" / "trained.safetensors", "pt") as file:
        assert not any(name.startswith(("vision.", "alignment.")) for name in file.keys())  # noqa: SIM118
    earlier = whole.folder / "stages" / "2-talk" / "earlier.safetensors"
    assert earlier.stat().st_nlink > 1


def test_a_finished_run_is_found_and_not_run_again(whole: Run) -> None:
    again = finished_run(whole.settings)
    assert again is not None and again.steps == whole.steps and again.curve == whole.curve
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(whole.settings)
    assert isinstance(eyespot.load(whole.model_folder, device="cpu").ask([], "hm?", max_new_tokens=2), str)


# --- stopped anywhere --------------------------------------------------------------------------------------------


def kill_at(line: str, words: list[str], number: int) -> int | None:
    process = Started("train", *words)
    for found in process.stderr:
        if found.startswith(line):
            process.send_signal(number)
            break
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.parametrize(
    ("side", "stage", "step", "number"),
    [
        pytest.param("qformer", 1, 2, signal.SIGKILL, id="in-the-first-stage"),
        pytest.param("language", 2, 2, signal.SIGINT, id="ctrl-c-in-the-second"),
        pytest.param("qformer", 3, 1, signal.SIGKILL, id="before-the-third-has-a-checkpoint"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    staged: Staged, drawn: Path, tmp_path: Path, side: str, stage: int, step: int, number: int
) -> None:
    code = kill_at(f"step {step}/{stage + 2}", words(drawn, tmp_path, "killed", side), number)
    assert code == (-number if number == signal.SIGKILL else 130)
    finished = sorted(path.parent.name for path in (tmp_path / "killed" / "stages").glob("*/training.json"))
    assert finished == ["0-joint", "1-align", "2-talk"][: stage - 1]
    assert not (tmp_path / "killed" / "model").exists()
    resumed, uninterrupted = staged("killed", side), staged("uninterrupted", side)
    assert resumed.finished and resumed.steps == uninterrupted.steps == 12
    same_bits(resumed.folder, uninterrupted.folder)


LOST = {
    "the model": ["model"],
    "the model and the record of the last stage": ["model", "stages/2-talk/training.json"],
    "the last stage": ["model", "stages/2-talk"],
    "all but the first stage": ["model", "stages/2-talk", "stages/1-align"],
    "the measure of the first stage": ["model", "stages/2-talk", "stages/1-align", "stages/0-joint/training.json",
                                       "stages/0-joint/retrieval.json"],
}  # fmt: skip


@pytest.mark.parametrize("lost", LOST)
def test_between_any_two_stages_nothing_is_lost(whole: Run, staged: Staged, tmp_path: Path, lost: str) -> None:
    """What a kill -9 leaves when it comes after a file was written and before the next one was."""
    folder = copied(whole, tmp_path)
    for name in LOST[lost]:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    once = [*folder.glob("stages/*/training.json"), *folder.glob("stages/*/earlier.safetensors")]
    kept = {path: path.stat().st_mtime_ns for path in once}
    resumed = staged("whole", side_of(whole))
    assert resumed.finished and resumed.steps == whole.steps and resumed.assistant is not None
    same_bits(whole.folder, folder)
    # a finished stage is not run again, and a file that checkpoints link is not written over
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_fresh_starts_over_and_other_settings_are_refused(whole: Run, staged: Staged, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    shutil.rmtree(folder / "model")
    shorter = THREE.replace("max_steps: 4", "max_steps: 2")
    with pytest.raises(ConfigError, match=r"holds an interrupted run with another stages"):
        staged("whole", side_of(whole), shorter)
    shutil.rmtree(folder / "stages" / "0-joint" / "checkpoints")
    shutil.rmtree(folder / "stages" / "1-align")
    with pytest.raises(ConfigError, match=r"0-joint' is finished but has no checkpoint; add --fresh"):
        staged("whole", side_of(whole))
    assert staged("whole", side_of(whole), shorter, fresh=True).steps == 10


def test_stages_may_share_adapters_and_weights_of_one_part(staged: Staged) -> None:
    """First all weights, then adapters over them; the weights stay what the first stage made them."""
    full = "{name: all, kind: caption, train: {connector: full, language: full}}"
    run = staged("both", "language", "model.alignment=null", f"stages=[{full}, {TALK}]")
    first, second = (load_parts(last(run.folder, name))[0].state_dict() for name in ("0-all", "1-talk"))
    changed = {name for name in first if name.startswith("language.") and not torch.equal(first[name], second[name])}
    assert changed and all("lora_" in name for name in changed)
    assert all(not first[name].any() for name in first if "lora_B" in name)
    assert run.settings.model.language.dtype == "float32"


# --- it learns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", list(SIDES))
def test_the_first_stage_learns_to_find_pictures_it_has_not_seen(staged: Staged, side: str) -> None:
    modes = "{vision: full, connector: full, alignment: full" + (", language: full}" if side == "language" else "}")
    options = "trainer: {epochs: 1000, max_steps: 160, batch_size: 16, warmup_share: 0.0, validate_every: 1000}"
    stage = f"{{name: joint, kind: joint, train: {modes}, {options}}}"
    run = staged("learns", side, f"stages=[{stage}]", "trainer.checkpoint_every=1000", "model.language.lora=null")
    losses = [loss for _, loss in run.curve]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    found = json.loads((run.folder / "stages" / "0-joint" / "retrieval.json").read_text())
    for direction in ("image_to_text", "text_to_image"):
        first = found[direction]["recall@1"]
        assert first["recall"] > 2 * first["chance"], (direction, found)


def test_only_seed_step_and_row_decide_what_is_drawn() -> None:
    alone = uniform(7, 3, [5], 0)
    parts = [uniform(7, 3, [2, 0, 3], rank) for rank in range(3)]
    assert torch.equal(torch.cat(parts, dim=1), alone) and alone.shape == (2, 5)
    assert not torch.equal(uniform(7, 4, [5], 0), alone) and not torch.equal(uniform(8, 3, [5], 0), alone)
    assert not torch.equal(alone[0], alone[1])


# --- what cannot work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "data", "words"),
    [
        ("joint", "{train: {format: easy_vqa}, validation_share: 0.0}", None),
        (
            "joint",
            "{train: {format: vqa, path: PAIRS}}",
            "stage 'joint' compares pictures with texts; none of 1 samples is usable",
        ),
        ("talk", "{train: {format: captions, path: nowhere.jsonl}}", "nowhere.jsonl"),
    ],
)
def test_data_of_every_stage_is_looked_at_before_the_first_one_starts(
    staged: Staged, tmp_path: Path, stage: str, data: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"id": "two", "images": ["a.png", "b.png"], "question": "?", "answer": "!"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    chosen = THREE.replace(
        f"name: {stage},", f"name: {stage}, data: {data.replace('PAIRS', str(tmp_path / 'pairs.jsonl'))},"
    )
    started = []

    def start(*arguments: Any) -> None:
        started.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("eyespot.training.stages.run_in", start)
    with pytest.raises((ValueError, KeyboardInterrupt), match=words):
        staged("looked-at", "qformer", chosen, "model.alignment={tokenizer: byte}")
    assert bool(started) == (words is None)


# --- preferences -------------------------------------------------------------------------------------------------


def test_preferences_end_a_run(staged: Staged, tmp_path: Path, drawn: Path) -> None:
    pytest.importorskip("trl")
    rows = [
        {"image": f"{i}.png", "question": "what is it?", "chosen": "a shape", "rejected": "a dog"} for i in range(4)
    ]
    (tmp_path / "preferred.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data: {{path: {tmp_path / 'preferred.jsonl'}, image_folder: {drawn.parent}}}"
    steps = "trainer: {max_steps: 2, batch_size: 2}"
    prefer = f"{{name: prefer, kind: preference, train: {{language: lora}}, {data}, {steps}}}"
    chosen = f"stages=[{ALIGN}, {TALK}, {prefer}]"
    run = staged("preferred", "language", "model.alignment=null", chosen)
    assert run.finished and run.steps == 11 and [step for step, _ in run.curve] == [1, 2]
    before = load_parts(last(run.folder, "1-talk"))[0].state_dict()
    after = weights(run.folder)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all("lora_" in name for name in changed)
    shutil.rmtree(run.folder / "model")
    (run.folder / "stages" / "2-prefer" / "training.json").unlink()
    assert staged("preferred", "language", "model.alignment=null", chosen).steps == 11
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(run.folder).items())


def test_settings_of_preferences_are_those_of_their_function() -> None:
    import inspect
    from dataclasses import fields

    from eyespot.config import PreferenceData, PreferenceTrainer
    from eyespot.training.preference import read_preferences, run_preference

    takes = inspect.signature(run_preference).parameters
    for field in fields(PreferenceTrainer):
        assert takes[field.name].default == field.default, field.name
    assert [field.name for field in fields(PreferenceData)] == list(inspect.signature(read_preferences).parameters)
