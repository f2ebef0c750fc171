"""Where a run is recorded beside its own folder: CSV, TensorBoard, MLflow, Weights & Biases, one switch each.

A run of eyespot is one run of a tracker, whatever its stages and interruptions: the ids stand in trackers.json of the
run's folder, and the metrics of a stage have its name before theirs (``look/train/loss``). While it trains, Lightning's
loggers write the metrics; behind it, ``log_results`` adds what stands in the folder: scores with their controls, tables
of answers, plots and, if wanted, the model.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import re
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from eyespot.config import ConfigError, LoggerSettings, TrainSettings
from eyespot.data.sample import ImageSource, Sample
from eyespot.files import one_at_a_time
from eyespot.processing.images import open_image
from eyespot.training.origin import git_commit, origin

IDS_FILE = "trackers.json"
PACKAGES = {  # by switch: what it imports, and the extra that installs it
    "tensorboard": (("tensorboard",), "train"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic", "pandas"), "tracking"),
    "wandb": (("wandb",), "tracking"),
}
PLOTS = ("loss.png", "before_after.png", "patches.png")
FILES = ("settings.json", "report.json", "report.html", "predictions.jsonl", "samples.jsonl", "data_report.txt")
NUM_ANSWERS = 48  # in the table of answers, each about another picture
THUMBNAIL = 128  # pixels
TIMEOUT_S = 10.0
SQLITE, MLFLOW_VARIABLE = "sqlite:///", "MLFLOW_TRACKING_URI"
# of a parameter, and parameters in one call. Source: https://mlflow.org/docs/latest/rest-api.html#request-limits
MOST_LETTERS, MOST_PARAMS = 6000, 100


class TrackingError(OSError):
    """A tracker cannot be reached or does not take what it is given; the run's own folder is not affected."""


class Tracker:
    """One run in one tracker; what a tracker has no place for stays in the run's folder alone.

    place: where to look at it, in words.
    """

    place: str

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Settings by their dotted names."""

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Numbers that belong to the whole run."""

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of texts, numbers and Pillow pictures, at least one, all with the same keys."""

    def log_plot(self, file: Path) -> None:
        """A PNG file."""

    def log_files(self, files: Sequence[Path]) -> None:
        """Files that are kept as they are."""

    def log_model(self, folder: Path) -> None:
        """All files of a model folder."""

    def end(self, finished: bool) -> None:
        """The run is over, or was stopped and may go on."""


# --- trackers ----------------------------------------------------------------------------------------------------


class TensorBoard(Tracker):
    """Events in logs/tensorboard of a folder; each stage has one of its own, which tells its curves from others'."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = f"TensorBoard: tensorboard --logdir {folder}"

    def logger(self) -> Any:
        """Lightning's logger, which writes the metrics of a training."""
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(self.folder, name="logs", version="tensorboard")

    @cached_property
    def _events(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "logs" / "tensorboard"))

    def log_params(self, values: Mapping[str, Any]) -> None:
        self._events.add_text("settings", markdown([{"setting": k, "value": v} for k, v in values.items()]))

    def log_metrics(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._events.add_text(name, markdown(rows))

    def log_plot(self, file: Path) -> None:
        import numpy as np

        self._events.add_image(file.stem, np.asarray(open_image(file)), dataformats="HWC")

    def end(self, finished: bool) -> None:
        self._events.close()


class MLflow(Tracker):
    """A run in an MLflow server, or in an SQLite file with the artifacts in a folder beside it."""

    def __init__(self, settings: LoggerSettings, folder: Path, run_id: str | None) -> None:
        self.uri = mlflow_uri(settings, folder)
        check_reachable(self.uri)
        file = Path(self.uri.removeprefix(SQLITE)) if self.uri.startswith(SQLITE) else None
        with _named("MLflow"), nullcontext() if file is None else one_at_a_time(file):
            self.client = _mlflow_client(self.uri)
            if run_id is None:
                experiment = self._experiment(settings.project, file and file.parent / "mlflow-artifacts")
                run_id = str(self.client.create_run(experiment, run_name=folder.name).info.run_id)
            self.id = run_id
            self.client.update_run(self.id, status="RUNNING")
        how = f"; to look: mlflow server --backend-store-uri {self.uri}" if file else ""
        self.place = f"MLflow: run {self.id} of experiment {settings.project!r} in {self.uri}{how}"

    def _experiment(self, name: str, artifacts: Path | None) -> str:
        """The id of an experiment; a new one keeps its artifacts in a folder, or where the server says."""
        if (found := self.client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        return str(self.client.create_experiment(name, artifacts and artifacts.as_uri()))

    def logger(self, prefix: str) -> Any:
        """Lightning's logger; the prefix and a slash stand before every name."""
        from lightning.pytorch.loggers import MLFlowLogger

        logger = MLFlowLogger(tracking_uri=self.uri, run_id=self.id, prefix=prefix)
        logger.LOGGER_JOIN_CHAR = "/"
        with _unchanged(MLFLOW_VARIABLE):  # or the next run of this process would go where this one goes
            _ = logger.experiment
        return logger

    def log_params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(allowed(name), str(value)[:MOST_LETTERS]) for name, value in values.items()]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.id, params=params[start : start + MOST_PARAMS])
        for name, value in origin().items():
            self.client.set_tag(self.id, f"eyespot.{name}", value)
        if commit := git_commit(Path.cwd()):
            self.client.set_tag(self.id, "mlflow.source.git.commit", commit.partition(" ")[0])

    def log_metrics(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, allowed(name), value)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        file = f"{name}.json"
        if any(artifact.path == file for artifact in self.client.list_artifacts(self.id)):  # else MLflow appends
            artifacts: Any = get_artifact_repository(self.client.get_run(self.id).info.artifact_uri)
            artifacts.delete_artifacts(file)
        self.client.log_table(self.id, {key: [row[key] for row in rows] for key in rows[0]}, file)

    def log_plot(self, file: Path) -> None:
        self.client.log_artifact(self.id, str(file), "plots")

    def log_files(self, files: Sequence[Path]) -> None:
        for file in files:
            self.client.log_artifact(self.id, str(file))

    def log_model(self, folder: Path) -> None:
        self.client.log_artifacts(self.id, str(folder), "model")

    def end(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class WandB(Tracker):
    """A run in Weights & Biases, or, offline, in the folder wandb of the run's folder, for ``wandb sync``."""

    def __init__(self, settings: LoggerSettings, folder: Path, run_id: str | None) -> None:
        import wandb

        self.id = run_id or uuid.uuid4().hex[:8]
        if wandb.run is None or wandb.run.id != self.id:
            with _named("Weights & Biases"):
                wandb.finish()
                wandb.init(
                    project=settings.project, name=folder.name, id=self.id, resume="allow", dir=str(folder),
                    mode="offline" if settings.wandb_offline else None,
                    settings=wandb.Settings(console="off", silent=True),
                )  # fmt: skip
        assert wandb.run is not None
        self.run = wandb.run
        self.run.define_metric("trainer/global_step")
        self.run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        files = Path(self.run.dir).parent
        offline = self.run.settings.mode == "offline"
        self.place = f"Weights & Biases: {f'wandb sync {files}' if offline else self.run.url}"

    def logger(self, prefix: str) -> Any:
        """Lightning's logger; the prefix and a slash stand before every name."""
        from lightning.pytorch.loggers import WandbLogger

        logger = WandbLogger(experiment=self.run, prefix=prefix)
        logger.LOGGER_JOIN_CHAR = "/"
        return logger

    def log_params(self, values: Mapping[str, Any]) -> None:
        self.run.config.update({**values, **{f"eyespot.{name}": value for name, value in origin().items()}})

    def log_metrics(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb
        from PIL.Image import Image

        def cell(value: Any) -> Any:
            return wandb.Image(value) if isinstance(value, Image) else value

        cells = [[cell(value) for value in row.values()] for row in rows]
        self.run.log({name: wandb.Table(columns=list(rows[0]), data=cells)})

    def log_plot(self, file: Path) -> None:
        import wandb

        self.run.log({file.stem: wandb.Image(str(file))})

    def log_files(self, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.id}-report", type="report")
        for file in files:
            artifact.add_file(str(file))
        self.run.log_artifact(artifact)

    def log_model(self, folder: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.id}-model", type="model")
        artifact.add_dir(str(folder), skip_cache=True, policy="immutable")
        self.run.log_artifact(artifact)

    def end(self, finished: bool) -> None:
        self.run.finish(0 if finished else 1)


TRACKERS: dict[str, Callable[[LoggerSettings, Path, str | None], MLflow | WandB]] = {"mlflow": MLflow, "wandb": WandB}


# --- a run -------------------------------------------------------------------------------------------------------


def check_trackers(settings: LoggerSettings, folder: Path) -> None:
    """Before anything is read or deleted.

    Raises:
        ConfigError: a tracker that is switched on is not installed.
        TrackingError: MLflow's server does not answer.
    """
    for switch, (packages, extra) in PACKAGES.items():
        for package in packages if getattr(settings, switch) else ():
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"logger.{switch} is true but {package} is not installed; pip install 'eyespot[{extra}]', or "
                    f"set logger.{switch}=false"
                )
    if settings.mlflow:
        check_reachable(mlflow_uri(settings, folder))


def whole_run(settings: TrainSettings) -> tuple[Path, str]:
    """The folder of the run, and the name of the stage whose settings these are, or ""."""
    name, _, stage = settings.name.partition("/stages/")
    return Path(settings.output_dir) / name, stage.partition("-")[2]


def open_trackers(settings: TrainSettings) -> list[MLflow | WandB]:
    """The runs in MLflow and Weights & Biases that belong to a run (settings.json stands in its folder); made, with all
    settings, when they are first asked for.

    Raises:
        TrackingError: a tracker cannot be reached, or does not know the run any more.
    """
    folder, _ = whole_run(settings)
    file = folder / IDS_FILE
    ids = json.loads(file.read_text()) if file.is_file() else {}
    opened: list[MLflow | WandB] = []
    for name, tracker in TRACKERS.items():
        if not getattr(settings.logger, name):
            continue
        one = tracker(settings.logger, folder, ids.get(name))
        opened.append(one)
        if name not in ids:
            with _named(name):
                one.log_params(_params(folder))
            ids[name] = one.id
            file.write_text(json.dumps(ids, indent=2))
    return opened


def loggers(settings: TrainSettings, folder: Path, *, first_process: bool) -> list[Any]:
    """Lightning's loggers of a training in its folder; processes other than the first one write nothing."""
    _, stage = whole_run(settings)
    found: list[Any] = []
    if settings.logger.csv:
        found.append(_csv_logger(folder, first_process))
    if settings.logger.tensorboard:
        found.append(TensorBoard(folder).logger())
    if first_process:
        found += [tracker.logger(stage) for tracker in open_trackers(settings)]
    return found


def _csv_logger(folder: Path, first_process: bool) -> Any:
    """Lightning's, which begins by deleting what stands there; of a run that goes on it is written back."""
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(folder, name="logs", version="csv", flush_logs_every_n_steps=1)  # nothing is lost
    file = Path(logger.log_dir) / "metrics.csv"
    if first_process and file.is_file():
        before = file.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            writer = logger.experiment
        file.write_text(before, "utf-8")
        writer.metrics_keys = before.partition("\n")[0].strip().split(",")
    return logger


def log_results(settings: TrainSettings, samples: Sequence[Sample] = ()) -> list[str]:
    """Give the trackers what a finished run left in its folder; returns where to look, one line for each.

    Args:
        samples: of the evaluation; their pictures stand in the table of answers.

    Raises:
        TrackingError: a tracker does not take it.
    """
    folder, _ = whole_run(settings)
    trackers: list[Tracker] = [*open_trackers(settings)]
    if settings.logger.tensorboard:
        trackers.append(TensorBoard(folder))
        trackers[-1].log_params(_params(folder))
    record = json.loads((folder / "model" / "training.json").read_text())
    metrics = training_metrics(record)
    if (folder / "report.json").is_file():
        metrics |= evaluation_metrics(json.loads((folder / "report.json").read_text("utf-8")))
    tables = {
        "answers": answers_table(folder, samples), "answers_while_training": samples_table(folder),
        "warnings": record.get("warnings", []),
    }  # fmt: skip
    for tracker in trackers:
        with _named(type(tracker).__name__):
            _log_folder(tracker, folder, metrics, tables, settings.logger.model)
    size = sum(file.stat().st_size for file in (folder / "model").iterdir()) / 1e6
    with_model = f"; with the model, {size:,.1f} MB" if settings.logger.model else ""
    return [tracker.place + ("" if isinstance(tracker, TensorBoard) else with_model) for tracker in trackers]


def _log_folder(
    tracker: Tracker,
    folder: Path,
    metrics: Mapping[str, float],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    with_model: bool,
) -> None:
    tracker.log_metrics(metrics)
    for name, rows in tables.items():
        if rows:
            tracker.log_table(name, rows)
    for name in PLOTS:
        if (folder / name).is_file():
            tracker.log_plot(folder / name)
    tracker.log_files([folder / name for name in FILES if (folder / name).is_file()])
    if with_model:
        tracker.log_model(folder / "model")
    tracker.end(finished=True)


def _params(folder: Path) -> dict[str, Any]:
    return flat(json.loads((folder / "settings.json").read_text()))


def end_interrupted(settings: TrainSettings) -> None:
    """Say to the trackers that a run was stopped; when it goes on, it goes on there, too."""
    for tracker in open_trackers(settings):
        tracker.end(finished=False)


# --- what is logged ----------------------------------------------------------------------------------------------


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by the dotted names that the command line takes.

    >>> flat({"trainer": {"lr": {"vision": 0.1}}, "stages": [{"name": "look"}], "limit": None})
    {'trainer.lr.vision': 0.1, 'stages.0.name': 'look', 'limit': None}
    """
    inner = values.items() if isinstance(values, Mapping) else enumerate(values) if _nests(values) else None
    if inner is None or not values:
        return {name: values}
    return {k: v for key, value in inner for k, v in flat(value, f"{name}.{key}" if name else str(key)).items()}


def _nests(values: Any) -> bool:
    return isinstance(values, list) and any(isinstance(value, Mapping) for value in values)


def training_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Steps, samples, seconds, and what stages found in samples that they held out."""
    found = {f"training/{key}": float(record[key]) for key in ("steps", "samples", "seconds")}
    for stage in record.get("stages", ()):
        numbers = flat(stage.get("retrieval") or {}, f"{stage['stage']}/retrieval")
        found |= {name: float(v) for name, v in numbers.items() if isinstance(v, (int, float))}
    return found


def evaluation_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The score with its interval, its controls, what it is above each of them, and the score of each kind."""
    top = f"evaluation/{report['measure']}"
    found = {top: report["accuracy"], f"{top}/low": report["interval"][0], f"{top}/high": report["interval"][1]}
    for name, control in report["controls"].items():
        found[f"{top}/{name}"] = control["accuracy"]
    for name, difference in report["differences"].items():
        found |= {f"evaluation/above_{name}/{key}": value for key, value in difference.items()}
    for kind, score in report["by_type"].items():
        found[f"evaluation/by_type/{kind}"] = score["accuracy"]
    found["evaluation/sees"] = float(report["verdict"].startswith("sees:"))
    found["evaluation/questions"] = report["num_questions"]
    return {name: float(value) for name, value in found.items()}


def answers_table(folder: Path, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Questions about different pictures, drawn by chance, with every answer; with their pictures if all have one."""
    if not (folder / "predictions.jsonl").is_file():
        return []
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    random.Random(0).shuffle(predictions)
    chosen = list({p["group"]: p for p in reversed(predictions)}.values())[:NUM_ANSWERS]
    pictures = {sample.id: sample.images[0] for sample in samples if sample.images}
    rows = []
    for prediction in chosen:
        row = {"picture": _thumbnail(pictures[prediction["id"]])} if prediction["id"] in pictures else {}
        row |= {
            "question": prediction["question"], "answer": prediction["prediction"],
            "truth": " | ".join(prediction["answers"]), "blind answer": prediction["blind_prediction"] or "",
            "answer to another picture": prediction["shuffled_prediction"] or "", "score": prediction["score"],
        }  # fmt: skip
        rows.append(row)
    if len({"picture" in row for row in rows}) > 1:
        rows = [{key: value for key, value in row.items() if key != "picture"} for row in rows]
    return rows


def _thumbnail(source: ImageSource) -> Any:
    image = open_image(source)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def samples_table(folder: Path) -> list[dict[str, Any]]:
    """The answers that were sampled in the run's trainings, as they were."""
    rows = []
    for file in sorted([*folder.glob("samples.jsonl"), *folder.glob("stages/*/samples.jsonl")]):
        stage = "" if file.parent == folder else file.parent.name.partition("-")[2]
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            rows.append({"stage": stage, **row, "truth": " | ".join(row["truth"])})
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; pictures are left out."""
    names = [name for name, value in rows[0].items() if not hasattr(value, "thumbnail")]
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(re.sub(r"[|\s]+", " ", cell) for cell in line) + " |" for line in lines)


# --- reaching trackers -------------------------------------------------------------------------------------------


def mlflow_uri(settings: LoggerSettings, folder: Path) -> str:
    """``logger.mlflow_uri``, or MLFLOW_TRACKING_URI, or the file mlflow.db beside the run's folder."""
    uri = settings.mlflow_uri or os.environ.get(MLFLOW_VARIABLE) or f"{SQLITE}{folder.parent / 'mlflow.db'}"
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}" if uri.startswith(SQLITE) else uri


def allowed(name: str) -> str:
    """A name as MLflow takes it. Source: https://mlflow.org/docs/latest/rest-api.html#log-metric

    >>> allowed("evaluation/by_type/what (else)?")
    'evaluation/by_type/what _else__'
    """
    return re.sub(r"[^\w/. -]", "_", name)


def _mlflow_client(uri: str) -> Any:
    """MLflow's client, without what MLflow says while it makes a new file."""
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # MLflow 3.17 with SQLAlchemy 2.1
        return MlflowClient(uri)


def check_reachable(uri: str) -> None:
    """Raise TrackingError if nobody answers there; MLflow itself would try for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(uri, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # somebody who wants a password, or has no page there
    except OSError as error:
        raise TrackingError(
            f"nobody answers at logger.mlflow_uri {uri!r} within {TIMEOUT_S:.0f} s ({error}); start the server, or "
            "drop logger.mlflow_uri for a file"
        ) from error


@contextmanager
def _unchanged(variable: str) -> Iterator[None]:
    """Behind it the environment variable is what it was."""
    before = os.environ.get(variable)
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What a tracker raises becomes a TrackingError that names it."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("mlflow", "wandb", "requests"):
            raise
        raise TrackingError(f"{name} refused: {error}") from error
