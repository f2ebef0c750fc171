"""Several processes as one run: which one this is, who starts them, what they agree on, how a lost one is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor, distributed
from torch.optim import Optimizer

from eyespot.config import ConfigError, TrainerSettings
from eyespot.training.sharding import like, whole

POLL_S = 0.5
PATIENCE_S = 10.0  # for a process to fail by itself after another one is gone; then it is ended
LOST_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "timeout")


def cluster() -> ClusterEnvironment:
    """Lightning's view of who started this process: torchrun, SLURM, or nobody (then Lightning starts the others).

    Raises:
        ConfigError: SLURM was asked for several tasks in a way that does not say how many run on a machine.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        try:
            return SLURMEnvironment(auto_requeue=False)  # a run stops, saves and resumes by itself
        except RuntimeError as error:
            raise ConfigError(str(error)) from error
    return LightningEnvironment()


def is_first_process() -> bool:
    """False in all processes of a run but one; they write nothing."""
    place = cluster()
    if isinstance(place, LightningEnvironment):
        return place.node_rank() == 0 and place.local_rank() == 0
    return bool(place.global_rank() == 0)


def check_processes(settings: TrainerSettings, device: torch.device) -> None:
    """Compare the settings with the devices of this machine and with what the launcher started.

    Raises:
        ConfigError: they do not fit.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, settings.devices)
    if settings.devices > there:
        raise ConfigError(f"trainer.devices is {settings.devices}; this machine has {there} of type {device.type}")
    place = cluster()
    wanted = settings.devices * settings.num_nodes
    if not isinstance(place, LightningEnvironment) and place.world_size() != wanted:
        raise ConfigError(
            f"{place.world_size()} processes were started, but trainer.devices={settings.devices} on "
            f"trainer.num_nodes={settings.num_nodes} are {wanted}; give torchrun or srun the same numbers"
        )


def own_device(device: torch.device) -> torch.device:
    """The device of this process; from here on "cuda" means it."""
    if device.type == "cuda":
        torch.cuda.set_device(cluster().local_rank())
    return device


def strategy_of(settings: TrainerSettings) -> Any:
    """Lightning's strategy: nothing special for one process, DDP, or FSDP."""
    world = settings.devices * settings.num_nodes
    timeout = timedelta(seconds=settings.timeout_s)
    if settings.strategy == "fsdp":
        return ShardedStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout
        )
    if settings.strategy == "auto" and world == 1:
        return "auto"
    # a device whose samples have no picture leaves the connector unused
    return CopiedStrategy(find_unused_parameters=True, timeout=timeout)


class Watch(threading.Thread):
    """Notices that another process of this machine is gone, and ends this one if it does not fail by itself.

    A collective operation over gloo fails as soon as a peer is gone; one over NCCL may hang until its time is up.
    Lightning's own observer kills the whole run without a word.

    Args:
        children: the processes that this one started; without any, its parent is watched.
        first: number of the first child in the run.
    """

    def __init__(self, children: Sequence[subprocess.Popen[Any]], first: int) -> None:
        super().__init__(daemon=True, name="watch")
        self.children, self.first, self.parent = children, first, os.getppid()
        self.lost: str | None = None
        self.noticed, self.done = threading.Event(), threading.Event()

    def run(self) -> None:
        while self.lost is None:
            if self.done.wait(POLL_S):
                return
            self.lost = self._look()
        self.noticed.set()
        if self.done.wait(PATIENCE_S):
            return
        print(f"eyespot train: {self.lost}; this process hangs on it and is ended", file=sys.stderr, flush=True)
        for child in self.children:
            child.kill()
        os._exit(1)

    def close(self, patience_s: float = 0.0) -> None:
        """Stop looking, after giving it so long to notice why this process failed."""
        self.noticed.wait(patience_s)
        self.done.set()

    def _look(self) -> str | None:
        if not self.children:
            return None if os.getppid() == self.parent else "the process that started this one is gone"
        for number, child in enumerate(self.children, self.first):
            if code := child.poll():
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"process {number} {how}"
        return None


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher, which runs this command once more for each further device, under a ``Watch``."""

    watch: Watch | None = None

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        place = self.cluster_environment
        place.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not place.creates_processes_externally:
            self._call_children_scripts()
        if isinstance(place, LightningEnvironment) and self.num_processes > 1:
            self.watch = Watch(self.procs, place.node_rank() * self.num_processes + 1)
            self.watch.start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            result = function(*args, **kwargs)
        except BaseException:
            if self.watch is not None:
                self.watch.close(4 * POLL_S)
            for process in self.procs:  # none can go on alone, and one may hang
                process.kill()
            raise
        if self.watch is not None:
            self.watch.close()
        return result


class CopiedStrategy(DDPStrategy):
    """Every process has the whole model and adds its gradients to those of the others (DDP, arXiv 2006.15704)."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class ShardedStrategy(ModelParallelStrategy):
    """Every process has a piece of each weight, gradient and optimizer state (FSDP, arXiv 2304.11277), as
    ``VLMModule.configure_model`` cut them. What it saves is what a single process would save."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # a checkpoint of eyespot holds the trained tensors in a file of their own

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        values = {i: {k: self._gathered(v) for k, v in one.items()} for i, one in state["state"].items()}
        return {**state, "state": values}

    def _gathered(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        gathered = whole(value)  # every process takes part, one keeps it
        return gathered.cpu() if self.is_global_zero else None

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", weights_only=weights_only)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {i: {k: like(parameters[i], v) for k, v in one.items()} for i, one in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})
        return checkpoint


class SameStart(lightning.Callback):
    """Before the first step, all processes compare what they are about to do.

    Args:
        facts: by name; equal in all processes.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raises ConfigError in all processes if two of them differ."""
        everyone = from_all(self.facts)
        for rank, facts in enumerate(everyone):
            for name, value in everyone[0].items():
                if facts[name] != value:
                    raise ConfigError(
                        f"process {rank} has {name} {facts[name]!r}, process 0 has {value!r}; all machines need the "
                        "same data, the same version of eyespot and one output_dir that they share"
                    )


def world_size() -> int:
    """How many processes work together at this moment."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def from_all(value: Any) -> list[Any]:
    """The value of every process, by rank; all of them must call this."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def numbers_of_all(numbers: Sequence[float], device: torch.device) -> Tensor:
    """The same for a few numbers, quicker: float64 [W, len(numbers)] on the CPU."""
    own = torch.tensor(numbers, dtype=torch.float64)
    if world_size() == 1:
        return own.unsqueeze(0)
    own = own.to(device)
    values = [torch.empty_like(own) for _ in range(world_size())]
    distributed.all_gather(values, own)
    return torch.stack(values).cpu()


def lost_process(strategy: Any, error: RuntimeError) -> str | None:
    """Words for the process that is gone, if an error comes from that; None if it means something else."""
    if world_size() == 1:
        return None
    watch = getattr(getattr(strategy, "launcher", None), "watch", None)
    if watch is not None and watch.lost is not None:
        return str(watch.lost)
    words = " ".join(str(error).split())
    if isinstance(error, distributed.DistError) or any(word in words.lower() for word in LOST_WORDS):
        return f"another process is gone or does not answer ({words[:200]})"
    return None
