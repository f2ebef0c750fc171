"""What MLflow, Weights & Biases and TensorBoard hold of a run, read back with their own readers."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eyespot import cli
from eyespot.config import ConfigError, LoggerSettings, TrainSettings
from eyespot.training import callbacks, tracking
from eyespot.training.origin import git_commit
from eyespot.training.run import Run, compose_settings
from eyespot.training.tracking import IDS_FILE, MLflow, TrackingError, check_reachable, flat, open_trackers

mlflow_client = pytest.importorskip("mlflow.tracking").MlflowClient
pytest.importorskip("wandb")
# what Lightning, MLflow and Weights & Biases say of each other
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = [
    "recipe=smoke", "data.limit=48", "data.validation_share=0.25", "trainer.log_every=1", "trainer.batch_size=4",
    "trainer.sight_every=0", "evaluation.limit=8", "evaluation.before=0", "evaluation.pictures=2",
    "evaluation.relevance=0", "evaluation.controls=[blind, shuffled]",
]  # fmt: skip
ALL = ["logger.mlflow=true", "logger.wandb=true", "logger.wandb_offline=true"]


def records(folder: Path) -> list[Any]:
    """Everything that Weights & Biases wrote offline for a run, every checksum verified.

    Source of the format: https://github.com/google/leveldb/blob/main/doc/log_format.md, behind a header of 7 bytes; the
    checksum is a plain CRC-32.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found, piece = [], b""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place = file.read_bytes(), 7
    assert data[:4] == b":W&B"
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        checksum, size, kind = struct.unpack_from("<IHB", data, place)
        body = data[place + 7 : place + 7 + size]
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == checksum
        piece, place = piece + body, place + 7 + size
        if kind in (1, 4):  # a whole one, or the last part
            found.append(Record.FromString(piece))
            piece = b""
    return found


def history(folder: Path) -> dict[str, list[Any]]:
    """Logged values by name, in their order."""
    values: dict[str, list[Any]] = {}
    for record in records(folder):
        for item in record.history.item:
            name = "/".join(item.nested_key) or item.key
            values.setdefault(name, []).append(json.loads(item.value_json))
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line with every tracker."""
    out = tmp_path_factory.mktemp("tracked")
    assert cli.main(["train", *SMALL, *ALL, "logger.model=true", f"output_dir={out}", "name=first"]) == 0
    return out / "first"


@pytest.fixture(scope="module")
def store(folder: Path) -> str:
    """The setting with which another run goes into the same file; a new one takes MLflow seconds."""
    return f"logger.mlflow_uri='sqlite:///{folder.parent / 'mlflow.db'}'"


@pytest.fixture(scope="module")
def client(folder: Path) -> Any:
    return mlflow_client(f"sqlite:///{folder.parent / 'mlflow.db'}")


@pytest.fixture(scope="module")
def logged(client: Any) -> Any:
    (experiment,) = client.search_experiments(filter_string="name = 'eyespot'")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_mlflow_has_all_settings_and_where_the_run_comes_from(folder: Path, logged: Any) -> None:
    settings = flat(json.loads((folder / "settings.json").read_text()))
    assert logged.data.params == {name: str(value) for name, value in settings.items()}
    assert logged.info.status == "FINISHED" and logged.info.run_name == "first"
    assert logged.data.tags["mlflow.source.git.commit"] == str(git_commit(Path.cwd())).partition(" ")[0]
    assert "torch 2" in logged.data.tags["eyespot.versions"]


def test_mlflow_has_the_curves(folder: Path, logged: Any, client: Any) -> None:
    record = json.loads((folder / "model" / "training.json").read_text())
    assert len(record["curve"]) > 2
    # Lightning counts a validation to the step before the one it follows
    for name, curve, late in (("train/loss", record["curve"], 0), ("val/loss", record["validation"], 1)):
        found = client.get_metric_history(logged.info.run_id, name)
        assert [m.step + late for m in found] == [step for step, _ in curve]
        assert [m.value for m in found] == pytest.approx([value for _, value in curve], rel=1e-6)


def test_mlflow_has_the_score_beside_its_controls(folder: Path, logged: Any) -> None:
    report, metrics = json.loads((folder / "report.json").read_text()), logged.data.metrics
    top = f"evaluation/{report['measure']}"
    assert [metrics[top], metrics[f"{top}/low"], metrics[f"{top}/high"]] == [report["accuracy"], *report["interval"]]
    assert {"blind", "shuffled"} <= set(report["controls"])
    for name, control in report["controls"].items():
        assert metrics[f"{top}/{name}"] == control["accuracy"]
        assert metrics[f"evaluation/above_{name}/low"] == report["differences"][name]["low"]
    assert metrics["evaluation/sees"] == float(report["verdict"].startswith("sees:"))


def test_mlflow_has_answers_with_pictures_plots_and_the_model(folder: Path, logged: Any, client: Any) -> None:
    def load(path: str) -> Path:
        return Path(client.download_artifacts(logged.info.run_id, path))

    table = json.loads(load("answers.json").read_text())
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    asked = {p["question"]: p for p in map(json.loads, lines)}
    for cells in table["data"]:
        row = dict(zip(table["columns"], cells, strict=True))
        assert load(row["picture"]["filepath"]).read_bytes()[1:4] == b"PNG"
        assert row["question"] in asked and row["truth"]
    assert len(table["data"]) == len({json.loads(line)["group"] for line in lines})
    sampled = json.loads(load("answers_while_training.json").read_text())
    assert len(sampled["data"]) == len((folder / "samples.jsonl").read_text().splitlines())
    for name in ("loss.png", "before_after.png", "patches.png"):
        assert load(f"plots/{name}").read_bytes() == (folder / name).read_bytes()
    assert load("report.json").read_bytes() == (folder / "report.json").read_bytes()
    for file in (folder / "model").iterdir():
        assert load(f"model/{file.name}").read_bytes() == file.read_bytes(), file.name


def test_weights_and_biases_wrote_a_valid_file(folder: Path) -> None:
    found, values = records(folder), history(folder)
    config = {item.key: json.loads(item.value_json) for record in found for item in record.config.update}
    config |= {item.key: json.loads(item.value_json) for record in found for item in record.run.config.update}
    assert config["trainer.lr.vision"] == 1e-3 and "torch 2" in config["eyespot.versions"]
    curve = json.loads((folder / "model" / "training.json").read_text())["curve"]
    assert values["train/loss"] == pytest.approx([loss for _, loss in curve], rel=1e-6)
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in found
        for item in record.summary.update
    }
    report = json.loads((folder / "report.json").read_text())
    assert summary[f"evaluation/{report['measure']}/blind"] == report["controls"]["blind"]["accuracy"]
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]


def test_weights_and_biases_has_tables_and_the_model(folder: Path) -> None:
    artifacts: dict[str, dict[str, str]] = {}
    for record in records(folder):
        for artifact in (record.artifact, record.request.log_artifact.artifact):
            if artifact.name:
                artifacts[artifact.name] = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    number = json.loads((folder / IDS_FILE).read_text())["wandb"]
    assert {"config.json", "model.safetensors", "training.json"} <= set(artifacts[f"{number}-model"])
    assert {"report.json", "predictions.jsonl", "settings.json"} <= set(artifacts[f"{number}-report"])
    answers = artifacts[f"run-{number}-answers"]
    table = json.loads(Path(answers["answers.table.json"]).read_text())
    for cells in table["data"]:
        row = dict(zip(table["columns"], cells, strict=True))
        assert Path(answers[row["picture"]["path"]]).read_bytes()[1:4] == b"PNG"
        assert row["question"] and row["truth"]
    assert list(folder.glob("wandb/offline-run-*/files/media/images/before_after*.png"))


def test_tensorboard_has_curves_scores_tables_and_plots(folder: Path) -> None:
    events = EventAccumulator(str(folder / "logs" / "tensorboard")).Reload()
    tags, report = events.Tags(), json.loads((folder / "report.json").read_text())
    assert {"settings/text_summary", "answers/text_summary"} <= set(tags["tensors"])
    assert set(tags["images"]) == {"loss", "before_after", "patches"}
    (score,) = events.Scalars(f"evaluation/{report['measure']}")
    assert score.value == pytest.approx(report["accuracy"])
    settings = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| trainer.lr.vision | 0.001 |" in settings


def test_an_interrupted_run_goes_on_in_the_same_run_of_a_tracker(
    store: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SMALL, "logger.mlflow=true", store, "logger.project=again", "evaluation.run=false", "name=again"]
    words = ["train", *overrides, "evaluation.pictures=0", f"output_dir={tmp_path}"]
    report = callbacks.Reporter._report

    def stop_at_2(self: Any, trainer: Any, module: Any, step: int) -> None:
        report(self, trainer, module, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Reporter, "_report", stop_at_2)
        assert cli.main(words) == 130
    number = json.loads((tmp_path / "again" / IDS_FILE).read_text())["mlflow"]
    assert client.get_run(number).info.status == "KILLED"
    assert cli.main(words) == 0
    assert client.get_run(number).info.status == "FINISHED"
    (experiment,) = client.search_experiments(filter_string="name = 'again'")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    record = json.loads((tmp_path / "again" / "model" / "training.json").read_text())
    found = client.get_metric_history(number, "train/loss")
    assert [metric.step for metric in found] == [step for step, _ in record["curve"]]

    def table() -> Any:
        return json.loads(Path(client.download_artifacts(number, "answers_while_training.json")).read_text())

    first = table()
    assert first["data"]
    tracking.log_results(compose_settings([*overrides, f"output_dir={tmp_path}"]))
    assert table() == first, "results that are logged again replace those that were there"


def test_a_run_that_died_before_its_first_checkpoint_stays_one_run(
    run: Callable[..., Run], store: str, tmp_path: Path
) -> None:
    def die(_: Any) -> None:
        raise KeyError("killed")

    logging = ["logger.mlflow=true", store, "logger.project=died", "logger.tensorboard=false"]
    with pytest.raises(KeyError, match="killed"):
        run("died", *logging, before_training=die)
    ids = (tmp_path / "died" / IDS_FILE).read_text()
    run("died", *logging)
    assert (tmp_path / "died" / IDS_FILE).read_text() == ids
    with pytest.raises(TrackingError, match="nobody answers"):
        run("died", "logger.mlflow=true", "logger.mlflow_uri=http://127.0.0.1:9", fresh=True)
    assert (tmp_path / "died" / "model" / "model.safetensors").is_file()
    run("died", *logging, fresh=True)
    assert (tmp_path / "died" / IDS_FILE).read_text() != ids


def test_stages_are_prefixes_in_one_run(store: str, tmp_path: Path) -> None:
    overrides = [*SMALL, "logger.mlflow=true", store, "logger.project=staged", f"output_dir={tmp_path}", "name=staged"]
    whole = compose_settings(overrides)
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "settings.json").write_text(json.dumps({"name": "staged"}))
    for number, stage in enumerate(("look", "speak")):
        name = f"staged/stages/{number}-{stage}"
        settings = TrainSettings(**{**vars(whole), "name": name})
        for logger in tracking.loggers(settings, tmp_path / name, first_process=True):
            logger.log_metrics({"train/loss": float(number)}, step=5)
    assert tracking.loggers(settings, tmp_path / name, first_process=False)[2:] == []
    (tracker,) = open_trackers(whole)
    metrics = tracker.client.get_run(tracker.id).data.metrics  # type: ignore[union-attr]
    assert metrics == {"look/train/loss": 0.0, "speak/train/loss": 1.0}


@pytest.mark.parametrize(("switch", "package"), [("mlflow", "mlflow"), ("mlflow", "sqlalchemy"), ("wandb", "wandb")])
def test_a_missing_package_is_said_before_anything_is_read(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"logger.{switch} is true but {package} is not installed; pip install 'eyespot\[tracking\]'"
    with pytest.raises(ConfigError, match=message):
        run("missing", f"logger.{switch}=true")
    assert not (tmp_path / "missing").exists()


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(TrackingError, match=f"nobody answers at logger.mlflow_uri '{uri}'"):
            MLflow(LoggerSettings(mlflow_uri=uri), Path("runs/x"), None)


def test_a_server_that_wants_a_password_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str, timeout: float) -> None:
        raise urllib.error.HTTPError(uri, 401, "who are you?", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    check_reachable("https://mlflow.example.com")


def test_a_run_that_the_tracker_does_not_know_is_an_error(store: str, tmp_path: Path) -> None:
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / IDS_FILE).write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    settings = compose_settings([*SMALL, "logger.mlflow=true", store, f"output_dir={tmp_path}", "name=lost"])
    with pytest.raises(TrackingError, match=r"MLflow refused: .*0123456789abcdef.* not found"):
        open_trackers(settings)


def test_the_next_run_of_a_process_may_go_elsewhere(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow would tell its address to all that comes, by the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text('{"name": "run"}')
    settings = compose_settings([*SMALL, "logger.mlflow=true", store, f"output_dir={tmp_path}", "name=run"])
    settings.logger.project = "elsewhere"
    tracking.loggers(settings, tmp_path / "run", first_process=True)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert tracking.mlflow_uri(LoggerSettings(), tmp_path / "run") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    assert tracking.mlflow_uri(LoggerSettings(), tmp_path / "run") == "https://mlflow.example.com"


def test_no_commit_outside_a_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """``mlflow server`` on a port of its own; its pages need Flask, which the client alone does not bring."""
    for module in ("flask", "flask_cors"):
        pytest.importorskip(module)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--port", str(port)]
    words += ["--workers", "1", "--artifacts-destination", str(tmp_path / "artifacts")]
    log = (tmp_path / "server.log").open("w")
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # jobs need huey
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", *words], stdout=log, stderr=log, env=quiet)
    try:
        until = time.monotonic() + 300
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def is_up(address: str) -> bool:
    try:
        check_reachable(address)
    except TrackingError:
        return False
    return True


def test_a_real_server_takes_a_run_and_gives_it_back(server: str, tmp_path: Path) -> None:
    """Written by this module over HTTP, read by REST without MLflow's client."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "settings.json").write_text('{"trainer": {"epochs": 2.0}}')
    (tmp_path / "far" / "loss.png").write_bytes(b"a picture")
    settings = compose_settings(
        [*SMALL, "logger.mlflow=true", f"logger.mlflow_uri={server}", f"output_dir={tmp_path}", "name=far"]
    )
    (tracker,) = open_trackers(settings)
    tracker.log_metrics({"evaluation/accuracy": 0.75})
    tracker.log_plot(tmp_path / "far" / "loss.png")
    tracker.end(finished=True)

    def get(path: str) -> Any:
        with urllib.request.urlopen(f"{server}{path}", timeout=30) as answer:
            return answer.read()

    run = json.loads(get(f"/api/2.0/mlflow/runs/get?run_id={tracker.id}"))["run"]
    assert run["info"]["status"] == "FINISHED"
    assert [(m["key"], m["value"]) for m in run["data"]["metrics"]] == [("evaluation/accuracy", 0.75)]
    assert {"key": "trainer.epochs", "value": "2.0"} in run["data"]["params"]
    assert get(f"/get-artifact?run_id={tracker.id}&path=plots/loss.png") == b"a picture"
