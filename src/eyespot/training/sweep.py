"""Many runs of one recipe with different settings, chosen by Optuna from what the runs before them gave.

The space is written as for Hydra's multirun (hydra.cc/docs/advanced/override_grammar/extended): ``key=a,b``,
``key=choice(a, b)``, ``key=range(1, 9)``, ``key=interval(0, 1)``, ``key=int(interval(1, 8))`` and
``key=tag(log, interval(1e-4, 1e-2))``.
Hydra's own sweeper for Optuna (hydra-optuna-sweeper 1.3.0) is not used: it takes only Optuna below 3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from eyespot.config import ConfigError, TrainSettings
from eyespot.training.run import Run, compose_settings, train

SWEEP_FILE, STUDY_FILE = "sweep.json", "study.db"


@dataclass(frozen=True)
class Trial:
    """One run: its number, what was chosen for it, and the lowest validation loss; None if it could not be trained."""

    number: int
    overrides: tuple[str, ...]
    loss: float | None


@dataclass
class Sweep:
    """What a sweep left in ``folder``; finished is False when it was stopped, and the same call goes on."""

    folder: Path
    trials: list[Trial]
    finished: bool

    @property
    def best(self) -> Trial | None:
        """The trial with the lowest validation loss."""
        trained = [trial for trial in self.trials if trial.loss is not None]
        return min(trained, key=lambda trial: trial.loss or 0.0, default=None)


def run_sweep(overrides: Sequence[str], *, trials: int, seed: int = 0, console: Console | None = None) -> Sweep:
    """Train up to ``trials`` runs and keep their losses in ``OUTPUT_DIR/NAME_sweep``; an interrupted sweep goes on.

    Args:
        overrides: those of a run, some of them with several values (see above).
        trials: how many runs in all, those of an earlier call included.
        seed: of the choice; the runs keep ``trainer.seed``.

    Raises:
        ConfigError: no setting has several values, a value cannot be used, there is no validation data, or the folder
            holds another sweep. ImportError: Optuna is not installed.
    """
    optuna = _optuna()
    console = console or Console(stderr=True)
    fixed, space = split_space(overrides)
    middle = compose_settings([*fixed, *(_override(key, _first(space[key])) for key in space)])
    if middle.data.validation is None and middle.data.validation_share == 0:
        raise ConfigError("runs are compared by validation loss; set data.validation_share above 0, or data.validation")
    folder = Path(middle.output_dir) / f"{middle.name}_sweep"
    study = _study(optuna, folder, {"fixed": fixed, "space": {key: repr(value) for key, value in space.items()}}, seed)
    waiting = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.RUNNING]
    while waiting or len(study.trials) < trials:
        number, chosen = (waiting[0].number, waiting[0].params) if waiting else _ask(study, space)
        waiting = waiting[1:]
        words = tuple(_override(key, value) for key, value in chosen.items())
        console.print(f"trial {number}: {' '.join(words)}", markup=False)
        try:
            settings = compose_settings([*fixed, *words])
            run = _train(replace(settings, output_dir=str(folder), name=f"trial-{number:03d}"), console)
        except ValueError:
            study.tell(number, state=optuna.trial.TrialState.FAIL)  # or the next call would try the same again
            raise
        if run is not None and not run.finished:
            return _result(optuna, study, folder, finished=False)
        loss = None if run is None else lowest(run)
        study.tell(number, loss, state=None if loss is not None else optuna.trial.TrialState.FAIL)
        console.print(f"trial {number}: {'could not be trained' if loss is None else f'validation loss {loss:.4f}'}")
    return _result(optuna, study, folder, finished=True)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError('sweeps need Optuna; pip install "eyespot[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _train(settings: TrainSettings, console: Console) -> Run | None:
    """The run, gone on with if it was interrupted; None if its loss became NaN or infinite."""
    from eyespot.training.module import TrainingStopped
    from eyespot.training.run import finished_run

    try:
        return finished_run(settings) or train(settings, console=console)
    except TrainingStopped as error:
        console.print(str(error), markup=False)
        return None


def lowest(run: Run) -> float | None:
    """The lowest validation loss of a run; None if there was none, or none that is finite."""
    return min((loss for _, loss in run.validation if math.isfinite(loss)), default=None)


# --- the space ---------------------------------------------------------------------------------------------------


def split_space(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Overrides with one value, and Optuna's distribution for each of the others by its key.

    Raises:
        ConfigError: none has several values, or one cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    fixed, space = [], {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"override {text!r} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if override.is_sweep_override():
            space[override.key_or_group] = distribution(override.value(), override.key_or_group)
        else:
            fixed.append(text)
    if not space:
        raise ConfigError(
            "nothing is to be varied; give a setting several values, such as 'trainer.lr.connector=tag(log, "
            "interval(1e-4, 1e-2))' or trainer.batch_size=choice(16,32)"
        )
    return fixed, space


def distribution(sweep: Any, key: str) -> Any:
    """Optuna's distribution for a value of Hydra's grammar with several values."""
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    optuna = _optuna()
    if isinstance(sweep, ChoiceSweep):
        return optuna.distributions.CategoricalDistribution([_text(value, key) for value in sweep.list])
    if isinstance(sweep, IntervalSweep):
        log = "log" in sweep.tags
        kinds = optuna.distributions.IntDistribution, optuna.distributions.FloatDistribution
        is_float = isinstance(sweep.start, float) or isinstance(sweep.end, float)
        return kinds[is_float](sweep.start, sweep.end, log=log)
    if isinstance(sweep, RangeSweep) and sweep.start is not None and sweep.stop is not None:
        last = sweep.start + sweep.step * (math.ceil((sweep.stop - sweep.start) / sweep.step) - 1)  # stop is excluded
        whole = all(isinstance(number, int) for number in (sweep.start, last, sweep.step))
        kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
        return kind(sweep.start, last, step=sweep.step)
    raise ConfigError(f"{key} cannot be varied by {type(sweep).__name__}; use choice, range or interval")


def _text(value: Any, key: str) -> str:
    """A choice as it is written in an override."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return str(value.with_quotes())
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ConfigError(f"{key} has the choice {value!r}; choices are words, numbers, true, false or null")


def _override(key: str, value: Any) -> str:
    return f"{key}={value}"


def _first(distribution: Any) -> Any:
    """Any value of a distribution, to see whether the settings can be composed."""
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


# --- the study ---------------------------------------------------------------------------------------------------


def _study(optuna: Any, folder: Path, asked: dict[str, Any], seed: int) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / STUDY_FILE}", study_name="sweep", sampler=sampler, load_if_exists=True
    )
    if study.user_attrs.get("asked", asked) != asked:
        raise ConfigError(
            f"{str(folder)!r} holds a sweep with other settings; use those, another name=..., or delete it"
        )
    study.set_user_attr("asked", asked)
    # a sampler that starts again would draw its first choices again
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _ask(study: Any, space: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    trial = study.ask(space)
    return trial.number, trial.params


def _result(optuna: Any, study: Any, folder: Path, *, finished: bool) -> Sweep:
    """The trials so far, also as JSON in the folder."""
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    trials = [
        Trial(trial.number, tuple(_override(key, value) for key, value in trial.params.items()), trial.value)
        for trial in study.trials
        if trial.state in done
    ]
    rows = [{"trial": t.number, "overrides": list(t.overrides), "validation_loss": t.loss} for t in trials]
    (folder / SWEEP_FILE).write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return Sweep(folder, trials, finished)
