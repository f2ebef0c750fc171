"""Several processes are one run: the same weights as one, one stop for all, and no hang when one of them is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eyespot.config import ConfigError, TrainerSettings
from eyespot.training import processes
from eyespot.training.processes import SameStart, check_processes, cluster, is_first_process
from eyespot.training.run import Run, comparable, last_checkpoint
from started import Started, free_port, said_by, tasks

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = ["recipe=smoke", "data.limit=40", "data.validation_share=0.2", "data.share=1", "evaluation.run=false",
         "evaluation.pictures=0", "trainer.device=cpu", "trainer.eps=1e-2", "trainer.log_every=1",
         "trainer.samples_every=2"]  # fmt: skip
TWO = ["trainer.devices=2", "trainer.batch_size=4"]
LORA = ["model.language.train=lora", "model.language.lora={r: 2, alpha: 4, targets: [q_proj, up_proj], dropout: 0.2}"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is inherited from a launcher under which the tests may run."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


Process = Started | subprocess.Popen[str]


def train(folder: Path, name: str) -> list[str]:
    return ["train", *SMALL, f"name={name}", f"output_dir={folder}"]


def start(folder: Path, name: str, *overrides: str) -> Started:
    """``eyespot train`` in a process of its own, which starts that of the second device in a new interpreter."""
    return Started(*train(folder, name), *overrides)


def finish(process: Process, code: int = 0) -> str:
    """What it said, once it has ended."""
    said = "".join(process.communicate(timeout=500))
    assert process.returncode == code, said
    return said


def wait_for(process: Process, step: int) -> int:
    """Let it reach a step, which one process says for all; returns the id of the process of the second device."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(f"step {step}/"):
            break
    assert sum(line.startswith(f"step {step - 1}/") for line in said) == 1, "".join(said)
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_close(found: Path, wanted: Path) -> None:
    for name, tensor in weights(wanted).items():
        torch.testing.assert_close(weights(found)[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def assert_equal(found: Path, wanted: Path) -> None:
    one, other = weights(found), weights(wanted)
    assert [name for name in other if not torch.equal(one[name], other[name])] == []


def torchrun(folder: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    """The example of the documentation, on this machine."""
    command = ["bash", str(Path(__file__).parents[2] / "examples" / "torchrun.sh")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "GPUS": "2", "HEAD": f"localhost:{free_port()}", "RESTARTS": "1"}
    return subprocess.Popen(
        [*command, *train(folder, name)[1:], *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip


# --- the same weights ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Some questions without a picture, one whose picture is broken, answers of very unequal length."""
    folder = tmp_path_factory.mktemp("mixed")
    Image.new("RGB", (9, 9), "red").save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    pictures: list[list[str]] = [["red.png"], [], [], ["broken.png"], [], ["red.png"], [], [], [], []]
    rows = [
        {"id": str(n), "images": images, "question": "what?", "answer": "red " * (1 + 3 * n)}
        for n, images in enumerate(pictures)
    ]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"data.train={{format: vqa, path: {folder / 'mixed.jsonl'}}}", "data.validation_share=0",
            "trainer.accumulate=2", "trainer.epochs=2", "trainer.num_samples=0"]  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_without_pictures_or_samples_keep_step(
    run: Callable[..., Run], tmp_path: Path, mixed: list[str], strategy: str
) -> None:
    """Micro-batches of one sample: a process often has no picture, and once no sample, where the other has one."""
    two = ["trainer.devices=2", "trainer.batch_size=1", f"trainer.strategy={strategy}"]
    said = said_by(tasks(*train(tmp_path, "two"), *mixed, *two))
    one = run("one", *SMALL[1:], *mixed, "trainer.batch_size=2")
    assert "left out 3" in said and said.count("step 2/") == 1, "the first process speaks for all"
    assert_close(tmp_path / "two", one.folder)
    record = json.loads((tmp_path / "two" / "model" / "training.json").read_text())
    assert record["samples"] == one.samples == 18
    assert [loss for _, loss in record["curve"]] == pytest.approx([loss for _, loss in one.curve], rel=1e-5)


def test_sharded_training_gives_the_weights_of_one_process(run: Callable[..., Run], tmp_path: Path) -> None:
    """With a frozen encoder, adapters and a tied head; what it saves is a whole model and a checkpoint like any."""
    frozen = [*LORA, "model.vision.train=frozen", "trainer.max_steps=4", "trainer.checkpoint_every=2"]
    frozen[1] = frozen[1].replace("dropout: 0.2", "dropout: 0")
    said_by(tasks(*train(tmp_path, "sharded"), *frozen, *TWO, "trainer.strategy=fsdp"))
    one = run("one", *SMALL[1:], *frozen, "trainer.batch_size=8")
    assert_close(tmp_path / "sharded", one.folder)
    files = [load_file(last_checkpoint(f) / "trained.safetensors") for f in (tmp_path / "sharded", one.folder)]  # type: ignore[operator]
    assert {name: t.shape for name, t in files[0].items()} == {name: t.shape for name, t in files[1].items()}
    answers = [(f / "samples.jsonl").read_text() for f in (tmp_path / "sharded", one.folder)]
    assert answers[0] == answers[1] and answers[0].count("\n") == 4
    validation = json.loads((tmp_path / "sharded" / "model" / "training.json").read_text())["validation"]
    assert [loss for _, loss in validation] == pytest.approx([loss for _, loss in one.validation], rel=1e-5)


# --- stops and losses ---------------------------------------------------------------------------------------------

LONG = [*LORA, *TWO, "trainer.epochs=4", "trainer.checkpoint_every=2", "trainer.validate_every=6"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, started by SLURM, that nothing interrupts, with dropout in both."""
    folder = tmp_path_factory.mktemp("whole")
    said = said_by(tasks(*train(folder, "whole"), *LONG))
    assert said.count("step 2/") == 1, "the first process speaks for all"
    return folder / "whole"


def test_when_one_process_hangs_or_is_killed_the_other_stops_and_the_run_resumes(tmp_path: Path, whole: Path) -> None:
    """The second one hangs, in the next start it is killed, in the third the first one is, in the last nobody."""
    folder = tmp_path / "killed"
    process = start(tmp_path, "killed", *LONG, "trainer.timeout_s=30")  # as long as a busy machine takes to start one
    os.kill(wait_for(process, 3), signal.SIGSTOP)
    said = finish(process, 1)
    assert "another process is gone or does not answer" in said and "step-0000002" in said
    for rank, step in ((1, 5), (0, 9)):
        process = start(tmp_path, "killed", *LONG)
        second = wait_for(process, step)
        killed_at = time.monotonic()
        os.kill(second if rank == 1 else process.pid, signal.SIGKILL)
        said = finish(process, 1 if rank == 1 else -signal.SIGKILL)  # ends when both have closed their streams
        assert time.monotonic() - killed_at < 30
        who = "process 1 was ended by SIGKILL" if rank == 1 else "the process that started this one is gone"
        assert f"eyespot train: {who}; stopped at step" in said
        assert f"last good checkpoint: {folder / 'checkpoints' / f'step-{step - 1:07d}'}" in said
        assert not (folder / "model").exists()
    assert "going on from" in finish(start(tmp_path, "killed", *LONG))
    assert_equal(folder, whole)


def test_under_torchrun_a_run_goes_on_by_itself_and_equals_that_of_slurm(tmp_path: Path, whole: Path) -> None:
    process = torchrun(tmp_path, "restarted", *LONG)
    os.kill(wait_for(process, 5), signal.SIGKILL)
    assert "going on from" in finish(process)
    assert_equal(tmp_path / "restarted", whole)


def test_all_processes_stop_at_one_step_and_others_may_go_on(run: Callable[..., Run], tmp_path: Path) -> None:
    """Only the second process gets the signal. One process with the samples of both, or another strategy, goes on."""
    plain = [words for words in LONG if words not in LORA]
    process = start(tmp_path, "stopped", *plain)
    os.kill(wait_for(process, 3), signal.SIGTERM)
    said = finish(process, 130)
    assert "stopped by SIGTERM at step " in said and "saved; to go on: eyespot train recipe=smoke" in said
    step = int(said.partition("stopped by SIGTERM at step ")[2].partition(",")[0])
    assert last_checkpoint(tmp_path / "stopped").name == f"step-{step:07d}"  # type: ignore[union-attr]
    uninterrupted = run("uninterrupted", *SMALL[1:], *plain[2:], "trainer.batch_size=8")
    shutil.copytree(tmp_path / "stopped", tmp_path / "kept")
    resumed = run("stopped", *SMALL[1:], *plain[2:], "trainer.batch_size=8")
    assert [s for s, _ in resumed.curve] == [s for s, _ in uninterrupted.curve]
    assert_close(tmp_path / "stopped", uninterrupted.folder)
    shutil.rmtree(tmp_path / "stopped")
    (tmp_path / "kept").rename(tmp_path / "stopped")
    said_by(tasks(*train(tmp_path, "stopped"), *plain, "trainer.strategy=fsdp"))
    assert_close(tmp_path / "stopped", uninterrupted.folder)


def test_divergence_in_one_process_stops_all_and_names_the_samples(tmp_path: Path) -> None:
    lr = "trainer.lr={vision: 1e9, connector: 1e9, language: 1e9}"
    said = said_by(tasks(*train(tmp_path, "diverges"), *TWO, lr, "trainer.clip=1e9", "trainer.epochs=20"), 1)
    assert said.count("eyespot train: ") == 1, "one message for all"
    assert " at step " in said and "samples easy_vqa-train" in said


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"}, False),
    ],
)
def test_which_process_is_the_first(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], first: bool) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first


def test_settings_and_launcher_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    check_processes(TrainerSettings(devices=2, num_nodes=3), cpu)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    check_processes(TrainerSettings(devices=2, num_nodes=2), cpu)
    with pytest.raises(ConfigError, match=r"4 processes were started, but trainer.devices=1 on trainer.num_nodes=1"):
        check_processes(TrainerSettings(), cpu)
    with pytest.raises(ConfigError, match=r"trainer.devices is 2; this machine has 1 of type mps"):
        check_processes(TrainerSettings(devices=2), torch.device("mps"))


def test_slurm_tasks_without_their_number_on_a_machine_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        cluster()


def test_processes_that_would_do_different_things_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"checkpoint": None, "number of steps": 9}
    monkeypatch.setattr(processes, "from_all", lambda facts: [facts, other])
    SameStart(other).setup(None, None, "fit")
    with pytest.raises(ConfigError, match="process 1 has checkpoint None, process 0 has 'step-0000004'"):
        SameStart({**other, "checkpoint": "step-0000004"}).setup(None, None, "fit")


def test_a_process_that_hangs_on_a_lost_one_is_ended() -> None:
    """A collective operation that never fails, as over NCCL, is a sleep here."""
    script = (
        "import subprocess, sys, time\n"
        "from eyespot.training import processes\n"
        "processes.PATIENCE_S = 0.2\n"
        "child = subprocess.Popen([sys.executable, '-c', 'raise SystemExit(3)'])\n"
        "processes.Watch([child], 1).start()\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "process 1 ended with exit code 3; this process hangs on it and is ended" in ended.stderr


def test_what_may_differ_when_a_run_goes_on() -> None:
    def settings(**trainer: Any) -> dict[str, Any]:
        return {"trainer": {"batch_size": 8, "accumulate": 1, "devices": 1, "num_nodes": 1, "lr": 1.0, **trainer}}

    one, other = comparable(settings(), settings(batch_size=2, devices=2, num_nodes=2, num_workers=3))
    assert one == other
    one, other = comparable(settings(), settings(devices=2))
    assert one != other and one["trainer"]["devices"] == 1
    one, other = comparable(settings(), settings(lr=2.0))
    assert one != other
