"""``eyespot`` in processes of its own, without the seconds that imports take: forked from a server that only imports.

Such a process has memory, environment, signals, streams and random numbers of its own. What only a new interpreter has,
another order of sets, is left to the tests that use ``interpreter``.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from threading import Timer
from typing import TextIO

import numpy as np
import torch

from eyespot import cli

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "lightning.pytorch", "hydra", "hydra.core.override_parser.overrides_parser", "peft", "torch.utils.tensorboard",
    "eyespot.cli", "eyespot.relevance", "eyespot.evaluation.finish",
    "eyespot.evaluation.pictures", "eyespot.evaluation.retrieval", "eyespot.training.callbacks",
    "eyespot.training.checkpoint", "eyespot.training.module", "eyespot.training.stages", "eyespot.training.watch",
])  # fmt: skip


class Started:
    """``eyespot WORDS``, with what tests use of subprocess.Popen; ``env`` is added to the environment."""

    def __init__(self, *words: str, env: Mapping[str, str] = {}) -> None:
        (out, child_out), (errors, child_errors) = SERVER.Pipe(duplex=False), SERVER.Pipe(duplex=False)
        self._process = SERVER.Process(target=_run, args=(words, {**os.environ, **env}, child_out, child_errors))
        self._process.start()
        child_out.close()
        child_errors.close()
        self.stdout, self.stderr = _text(out), _text(errors)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it said on both streams, once it and all that share them have ended; it is killed after ``timeout``."""
        watch = Timer(timeout, self._process.kill)
        watch.start()
        with self.stderr, self.stdout:
            errors, out = self.stderr.read(), self.stdout.read()
        self._process.join()
        watch.cancel()
        return out, errors


def tasks(*words: str) -> list[Started]:
    """``eyespot WORDS`` in two processes of one run, as SLURM would start two tasks on one machine."""
    common = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
              "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "eyespot", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [Started(*words, env={**common, "SLURM_PROCID": task, "SLURM_LOCALID": task}) for task in "01"]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def said_by(processes: Sequence[Started], code: int = 0) -> str:
    """What they said, once all have ended with this code."""
    said = ["".join(process.communicate(timeout=500)) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "".join(said)
    return "".join(said)


def interpreter(*words: str) -> subprocess.Popen[str]:
    """``eyespot WORDS`` in an interpreter of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "eyespot", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _text(stream: Connection) -> TextIO:
    return os.fdopen(os.dup(stream.fileno()), encoding="utf-8", errors="replace")


def _run(words: tuple[str, ...], environment: dict[str, str], out: Connection, errors: Connection) -> None:
    """What ``python -W ignore -m eyespot WORDS`` does."""
    for stream, number in ((out, 1), (errors, 2)):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment, PYTHONWARNINGS="ignore")
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)  # of the workers that load data, as elsewhere
    for seed in (random.seed, np.random.seed, torch.seed):
        seed()
    main = types.ModuleType("__main__")  # from which Lightning finds out how to start the other processes
    main.__spec__ = importlib.util.find_spec("eyespot.__main__")
    sys.modules["__main__"], sys.argv = main, ["eyespot", *words]
    sys.exit(cli.main(words))
