"""Sweeps: the space in Hydra's notation, runs that are chosen, and a sweep that goes on."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eyespot.cli import main
from eyespot.config import ConfigError
from eyespot.training import sweep as sweeps
from eyespot.training.run import Run
from eyespot.training.sweep import run_sweep, split_space

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore")

Float, Int = optuna.distributions.FloatDistribution, optuna.distributions.IntDistribution
Choice = optuna.distributions.CategoricalDistribution
FEW = ["recipe=smoke", "data.limit=20", "data.validation_share=0.2", "trainer.max_steps=2", "trainer.validate_every=2"]
RATES = "trainer.lr.connector=tag(log, interval(1e-4, 1e-2))"


def sweep(folder: Path, *space: str, trials: int, **options: Any) -> sweeps.Sweep:
    console = Console(file=io.StringIO())
    return run_sweep([*FEW, f"output_dir={folder}", *space], trials=trials, console=console, **options)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.clip=interval(0.5, 2)", Float(0.5, 2.0)),
        ("trainer.lr.connector=tag(log, interval(1e-4, 1e-2))", Float(1e-4, 1e-2, log=True)),
        ("trainer.batch_size=int(interval(2, 8))", Int(2, 8)),
        ("trainer.accumulate=range(1, 8, 2)", Int(1, 7, step=2)),
        ("trainer.accumulate=range(1, 4)", Int(1, 3)),
        ("trainer.weight_decay=range(0.0, 0.3, 0.1)", Float(0.0, 0.2, step=0.1)),
        ("trainer.batch_size=choice(4, 8)", Choice(["4", "8"])),
        ("connector=linear,mlp", Choice(["linear", "mlp"])),
        ("data.packing=true,false", Choice(["true", "false"])),
        ("trainer.patience=null,3", Choice(["null", "3"])),
        ("name='a b',c", Choice(["'a b'", "c"])),
    ],
)
def test_hydras_notation(override: str, expected: Any) -> None:
    fixed, space = split_space(["recipe=smoke", override])
    key = override.partition("=")[0]
    assert fixed == ["recipe=smoke"] and list(space) == [key]
    assert space[key].__class__ is expected.__class__
    values = {name: pytest.approx(v) if isinstance(v, float) else v for name, v in expected._asdict().items()}
    assert space[key]._asdict() == values


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.batch_size=8", "nothing is to be varied; give a setting several values"),
        ("trainer.batch_size=choice(", "cannot be read"),
        ("connector=glob(*)", "cannot be varied by Glob"),
        ("trainer.betas=choice([0.9,0.95],[0.9,0.99])", "choices are words, numbers, true, false or null"),
        ("trainer.batchsize=choice(4,8)", "did you mean 'batch_size'?"),
    ],
)
def test_what_cannot_be_varied(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(tmp_path, override, trials=1)
    assert words in str(caught.value) and not list(tmp_path.iterdir())


def test_trials_differ_as_chosen_and_the_lowest_loss_wins(tmp_path: Path) -> None:
    found = sweep(tmp_path, RATES, "connector=linear,mlp", trials=3)
    assert found.finished and [trial.number for trial in found.trials] == [0, 1, 2] and found.best is not None
    assert len({trial.overrides for trial in found.trials}) == 3
    for trial in found.trials:
        record = json.loads((found.folder / f"trial-{trial.number:03d}" / "model" / "training.json").read_text())
        chosen = dict(word.split("=") for word in trial.overrides)
        assert record["settings"]["trainer"]["lr"]["connector"] == float(chosen["trainer.lr.connector"])
        assert record["settings"]["model"]["connector"]["name"] == chosen["connector"]
        assert trial.loss == min(loss for _, loss in record["validation"])
        assert record["settings"]["trainer"]["max_steps"] == 2
    assert found.best.loss == min(trial.loss for trial in found.trials if trial.loss is not None)
    rows = json.loads((tmp_path / "smoke_sweep" / "sweep.json").read_text())
    assert [row["validation_loss"] for row in rows] == [trial.loss for trial in found.trials]


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second trial is stopped: the next call finishes that one with the same choice, then adds another."""
    whole = sweep(tmp_path / "whole", RATES, trials=2)
    train, calls = sweeps.train, []

    def stopped(settings: Any, **options: Any) -> Run:
        calls.append(settings.trainer.lr.connector)
        if len(calls) != 2:
            return train(settings, **options)
        return Run(Path(), settings, False, 1, 1, 0.0, [], [], "SIGINT")

    monkeypatch.setattr(sweeps, "train", stopped)
    first = sweep(tmp_path / "parts", RATES, trials=2)
    assert not first.finished and [trial.loss for trial in first.trials] == [whole.trials[0].loss]
    second = sweep(tmp_path / "parts", RATES, trials=3)
    assert second.finished and second.trials[:2] == whole.trials and len(second.trials) == 3
    assert calls[1] == calls[2]
    assert sweep(tmp_path / "parts", RATES, trials=3).trials == second.trials and len(calls) == 4
    with pytest.raises(ConfigError, match="holds a sweep with other settings"):
        sweep(tmp_path / "parts", "trainer.clip=interval(0.5, 2)", trials=3)


def test_a_diverging_trial_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    rates = "trainer.lr.connector=choice(1e-3, 1e30)"
    found = sweep(tmp_path, rates, "trainer.clip=1e30", "trainer.warmup_share=0.0", "trainer.epochs=4", trials=4)
    losses = {trial.overrides: trial.loss for trial in found.trials}
    assert losses[("trainer.lr.connector=1e+30",)] is None and losses[("trainer.lr.connector=0.001",)] is not None
    assert found.best is not None and found.best.overrides == ("trainer.lr.connector=0.001",)


def test_no_validation_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compared by validation loss; set data\.validation_share above 0"):
        sweep(tmp_path, RATES, "data.validation_share=0.0", trials=1)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", *FEW, f"output_dir={tmp_path}", "trainer.clip=choice(0.5,1.0)", "--trials", "1", "--seed", "3"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"1 trials: {tmp_path / 'smoke_sweep' / 'sweep.json'}" in said and "best: validation loss" in said


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "eyespot\[sweep\]"'):
        sweep(tmp_path, RATES, trials=1)
