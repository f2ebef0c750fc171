"""This machine, measured: the operations of a plan, the heaviest first, run here for about ten seconds.

What was timed is kept on disk for each processor, number of threads and version of torch, by operation and shapes. An
operation that there was no time for is taken at the rate of those that were timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from eyespot.devices import choose_device
from eyespot.files import default_cache
from eyespot.models.language.gpt import EyespotGPTConfig
from eyespot.models.vision.vit import EyespotViTConfig
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.plan.trace import Call, Spec, Trace, as_fake, trace_training
from eyespot.training.optim import adamw

PROBE_S = 10.0
CALL_S = 0.05  # on one operation, if a single run of it does not take longer
REPEATS = 7
LARGEST_BYTES = 4e9  # of an operation that is still run
OPTIMIZED = 4_000_000  # parameters whose update is timed: more than a cache holds


@dataclass
class Machine:
    """name: of the processor. seconds: of operations, by their key. per_op_s: what Python and autograd need around
    each. per_parameter_s: clipping and AdamW, for each trainable parameter. measured: when."""

    name: str
    threads: int
    memory_gb: float
    seconds: dict[str, float] = field(default_factory=dict)
    per_op_s: float = 0.0
    per_parameter_s: float = 0.0
    measured: str = ""

    def step_seconds(self, calls: Sequence[Call], num_ops: float, trainable: int) -> float:
        """Of a step's operations and of its update."""
        rates = self.rates(calls)
        return (
            sum(call.count * self._of(call, rates) for call in calls)
            + num_ops * self.per_op_s
            + trainable * self.per_parameter_s
        )

    def rates(self, calls: Iterable[Call]) -> tuple[float, float]:
        """FLOP/s of the timed ones among the operations that multiply matrices, bytes/s of the others."""
        work = [0.0, 0.0]
        spent = [1e-12, 1e-12]
        for call in calls:
            if (seconds := self.seconds.get(key_of(call))) is not None:
                kind = 0 if call.flops else 1
                work[kind] += call.count * (call.flops or call.num_bytes)
                spent[kind] += call.count * seconds
        return work[0] / spent[0], work[1] / spent[1]

    def _of(self, call: Call, rates: tuple[float, float]) -> float:
        if (seconds := self.seconds.get(key_of(call))) is not None:
            return seconds
        work, rate = (call.flops, rates[0]) if call.flops else (call.num_bytes, rates[1])
        return work / rate if rate else 0.0


def key_of(call: Call) -> str:
    """Names an operation and its shapes in the file."""
    text = f"{call.name}{call.args}{sorted(call.kwargs.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def probe(calls: Sequence[Call], device: str = "auto", seconds: float = PROBE_S, fresh: bool = False) -> Machine:
    """This machine, as far as it was measured before, and as many of the operations as fit into the time.

    Args:
        device: of the trainer. seconds: for timing; 0 takes what was measured before. fresh: measure again.
    """
    kind = choose_device(device)
    machine, file = _remembered(kind)
    if fresh:
        machine.seconds.clear()
        machine.per_op_s = machine.per_parameter_s = 0.0
    if seconds > 0 and not machine.per_parameter_s:
        machine.per_op_s, machine.per_parameter_s = per_op_seconds(kind), per_parameter_seconds(kind)
    deadline = time.perf_counter() + seconds
    for call in sorted(calls, key=_guess, reverse=True):
        if time.perf_counter() > deadline:
            break
        if key_of(call) not in machine.seconds and call.num_bytes < LARGEST_BYTES:
            found = time_call(call, kind)
            if found is not None:
                machine.seconds[key_of(call)] = found
    machine.measured = datetime.now(UTC).isoformat(timespec="seconds")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(machine.__dict__), encoding="utf-8")
    return machine


def _remembered(device: torch.device) -> tuple[Machine, Path]:
    name, threads = device_name(device), torch.get_num_threads()
    key = hashlib.sha256(f"{name} {threads} {torch.__version__}".encode()).hexdigest()[:16]
    file = default_cache() / "plan" / f"{key}.json"
    if file.is_file():
        return Machine(**json.loads(file.read_text(encoding="utf-8"))), file
    return Machine(name, threads, memory_of(device) / 1e9), file


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor as Linux gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_of(device: torch.device) -> float:
    """Bytes of memory in all."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _guess(call: Call) -> float:
    """What an operation may cost in a step, to measure the heaviest first."""
    return call.count * (call.flops / 5e10 + call.num_bytes / 5e9 + 5e-6)


def time_call(call: Call, device: torch.device) -> float | None:
    """Median seconds of an operation on made-up numbers; None if it does not take such."""
    try:
        args, kwargs = tree_map(lambda value: _made(value, device), (call.args, call.kwargs))
        with torch.no_grad():
            call.func(*args, **kwargs)
            return _median(lambda: call.func(*args, **kwargs), device)
    except (RuntimeError, IndexError, ValueError):  # it wants certain numbers, such as as many as a mask has places
        return None


def _made(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.device):
        return device
    if not isinstance(value, Spec):
        return value
    places = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride, strict=True))
    number: float = 0.5 if value.dtype.is_floating_point else value.dtype == torch.bool
    storage = torch.full((max(1, places),), number, dtype=value.dtype, device=device)
    return storage.as_strided(value.shape, value.stride)


def _median(work: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < CALL_S:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def per_parameter_seconds(device: torch.device) -> float:
    """Clipping, AdamW and forgetting the gradients, for one trainable parameter."""
    model = torch.nn.Module()
    weight = torch.nn.Parameter(torch.full((OPTIMIZED // 1000, 1000), 0.5, device=device))
    parts = {"vision": torch.nn.ParameterList([weight]), "connector": None, "language": None, "alignment": None}
    for name, part in {**parts, "detection": None}.items():
        setattr(model, name, part)
    optimizer = adamw(model, {"vision": 1e-4}, 0.01, (0.9, 0.999), 1e-8)
    gradient = torch.full_like(weight, 1e-3)

    def update() -> None:
        weight.grad = gradient
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update()
    return _median(update, device) / OPTIMIZED


def per_op_seconds(device: torch.device) -> float:
    """What is left of a pass of a tiny model when its operations are timed alone, for each of them."""
    model, batch = _tiny()
    fake, mode = VLM(model.config), FakeTensorMode(allow_non_fake_inputs=True)
    as_fake(fake, mode)
    with mode:
        traced = trace_training(fake.train(), {**batch, "pixel_values": torch.empty(2, 3, 32, 32)}, _loss(fake),
                                bf16=False, accumulates=False)  # fmt: skip
    torch.nn.Module.to(model, device).train()
    there = {name: tensor.to(device) for name, tensor in batch.items()}
    there["pixel_values"] = torch.rand(2, 3, 32, 32, device=device)

    def work() -> None:
        _loss(model)(there).backward()
        model.zero_grad()

    work()
    alone = sum(call.count * (time_call(call, device) or 0.0) for call in traced.calls)
    return max(0.0, _median(work, device) - alone) / traced.num_ops


def _loss(model: VLM) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda batch: model(**batch).loss


def _tiny() -> tuple[VLM, dict[str, Tensor]]:
    """A model in which every operation is as good as nothing, and two rows of 24 tokens."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = EyespotViTConfig(**sizes, image_size=32, patch_size=8)
    text = EyespotGPTConfig(**sizes, vocab_size=64, max_position_embeddings=64)
    config = VLMConfig(
        vision_config=vision, text_config=text, connector={"name": "linear"}, image_token_id=64, num_image_tokens=16
    )
    ids = torch.ones(2, 24, dtype=torch.long)
    ids[:, :16] = 64
    labels = torch.where(ids == 64, -100, ids)
    return VLM(config), {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


__all__ = ["Machine", "Trace", "probe"]
