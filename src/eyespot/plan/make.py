"""A plan: every stage of a run, on every device that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from eyespot.config import TrainSettings, check_settings
from eyespot.devices import choose_device, has_fast_bfloat16
from eyespot.plan.batches import Assumed, loading_seconds
from eyespot.plan.devices import HERE, USABLE_SHARE, Device, choose
from eyespot.plan.machine import PROBE_S, Machine, probe
from eyespot.plan.rehearsal import fill, fits, rehearse, rehearse_encoding
from eyespot.plan.skeleton import decided
from eyespot.plan.steps import ENCODED_AT_ONCE, Stage, Step, Tracer, runs_bf16, stages_of
from eyespot.plan.switches import variations
from eyespot.training.run import num_workers_of

BATCHES = (1, 8, 16, 32)
TRACED = (1, 32)  # batch sizes between which memory is taken to grow evenly, beside the recipe's own
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Estimate:
    """A stage on a device. samples_per_s: of all devices of the run together. hours: of the training, features that are
    computed beforehand included. largest_batch: samples on one device; None if not even one fits."""

    device: str
    samples_per_s: float
    hours: float
    dollars: float | None
    memory_gb: float
    fits: bool
    largest_batch: int | None


@dataclass(frozen=True)
class SwitchEffect:
    """What another setting changes: GFLOP of a sample, GB at the peak, samples a second on the first device."""

    name: str
    trainable: int
    gflop: float
    memory_gb: float
    samples_per_s: float


@dataclass
class Profile:
    """A stage where matrix products are in bfloat16, or where they are in float32.

    gflop: of a sample, by part and phase. memory: bytes at the peak, by what they are for. training_gb, inference_gb:
    by batch size.
    """

    precision: str
    gflop: dict[str, float]
    gflop_per_sample: float
    memory: dict[str, float]
    training_gb: dict[int, float]
    inference_gb: dict[int, float]


@dataclass
class StagePlan:
    """parameters: part to (all, those that learn). read: whether the batches are of the run's own data, or assumed."""

    name: str
    kind: str
    parameters: dict[str, tuple[int, int]]
    steps: int
    samples: float
    pictures: int
    batch_samples: float
    read: bool
    keeps_features: bool
    features_gb: float
    profiles: list[Profile] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)
    switches: list[SwitchEffect] = field(default_factory=list)


@dataclass
class Plan:
    """name: of the run. left_out: stages that nothing is said about. machine: what was measured here."""

    name: str
    stages: list[StagePlan]
    left_out: list[str]
    machine: dict[str, Any] | None
    devices: list[dict[str, Any]]

    @property
    def totals(self) -> list[tuple[str, float, float | None]]:
        """Device, hours and dollars of all stages."""
        rows = []
        for index, first in enumerate(self.stages[0].estimates):
            column = [stage.estimates[index] for stage in self.stages]
            dollars = [estimate.dollars for estimate in column]
            known = None if None in dollars else sum(d for d in dollars if d is not None)
            rows.append((first.device, sum(estimate.hours for estimate in column), known))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        totals = [{"device": device, "hours": hours, "dollars": dollars} for device, hours, dollars in self.totals]
        return {**asdict(self), "totals": totals}


def make_plan(
    settings: TrainSettings,
    devices: Sequence[str] = (HERE,),
    *,
    assumed: Assumed | None = None,
    seconds: float = PROBE_S,
    fresh: bool = False,
    switches: bool = True,
) -> Plan:
    """What a run will need, without a weight being loaded.

    Args:
        devices: "here" or names of ``eyespot.plan.devices.DEVICES``; the effects of switches are for the first.
        assumed: about data, in place of reading it. seconds: for measuring this machine, if it is asked for.
        fresh: measure this machine again. switches: whether their effects are wanted.

    Raises:
        ConfigError: settings that cannot work, or data about which nothing is known.
        ValueError: an unknown device.
    """
    check_settings(settings)
    chosen = choose(devices)
    planner = _Planner(settings, chosen, Tracer(assumed), seconds, fresh)
    stages = [planner.stage(stage, switches) for stage in stages_of(settings)]
    left_out = [stage.name for stage in settings.stages or [] if stage.kind == "preference"]
    machine = None if planner.machine is None else {
        key: value for key, value in asdict(planner.machine).items() if key != "seconds"
    }  # fmt: skip
    return Plan(settings.name, stages, left_out, machine, [asdict(device) for device in chosen if device is not None])


@dataclass(frozen=True)
class Real:
    """What rehearsals of a stage say. share: of the seconds that its operations take alone, seconds that a real step
    takes. encoding_s: of a picture whose features are kept; None if that was not rehearsed."""

    share: float = 1.0
    encoding_s: float | None = None


class _Planner:
    def __init__(
        self, settings: TrainSettings, devices: list[Device | None], tracer: Tracer, seconds: float, fresh: bool
    ) -> None:
        self.settings, self.devices, self.tracer = settings, devices, tracer
        self.seconds, self.fresh = seconds, fresh
        self.machine: Machine | None = None
        self.real: dict[str, Real] = {}  # by stage
        here = choose_device(settings.trainer.device) if None in devices else torch.device("cpu")
        self.fast_here = has_fast_bfloat16(here)

    def is_fast(self, stage: Stage, device: Device | None) -> bool:
        """Whether bfloat16 is taken on a device because it is quick there; False where the settings decide alone."""
        model, trainer = stage.settings.model, stage.settings.trainer
        same = decided(model, True) == decided(model, False) and trainer.precision != "auto"
        return not same and (self.fast_here if device is None else True)

    def stage(self, stage: Stage, switches: bool) -> StagePlan:
        kinds = dict.fromkeys(self.is_fast(stage, device) for device in self.devices)
        steps = {fast: self.tracer.step(stage, fast) for fast in kinds}
        one = next(iter(steps.values()))
        plan = StagePlan(
            name=stage.name,
            kind=stage.kind,
            parameters={row.part: (row.total, row.trainable) for row in one.parameters},
            steps=one.work.num_steps,
            samples=one.work.num_samples,
            pictures=one.work.num_pictures,
            batch_samples=one.samples,
            read=one.work.is_read,
            keeps_features=one.encoding is not None,
            features_gb=one.feature_bytes * one.work.num_pictures / 1e9,
        )
        curves = {fast: self.curve(stage, fast, step) for fast, step in steps.items()}
        plan.profiles = [self.profile(stage, fast, step, curves[fast]) for fast, step in steps.items()]
        for device in self.devices:
            fast = self.is_fast(stage, device)
            plan.estimates.append(self.estimate(stage, device, steps[fast], curves[fast]))
        if switches:
            plan.switches = self.switches(stage, steps[self.is_fast(stage, self.devices[0])])
        return plan

    def curve(self, stage: Stage, fast: bool, step: Step) -> dict[int, float]:
        """Bytes of training by batch size, at those that are traced."""
        sizes = {*TRACED, stage.settings.trainer.batch_size}
        if stage.kind in ("joint", "contrastive", "matching"):
            sizes.discard(1)  # pairs are compared with each other
            sizes.add(2)
        own = stage.settings.trainer.batch_size
        traced = {n: self.tracer.memory_at(stage, fast, n).total for n in sizes - {own}}
        return dict(sorted({**traced, own: step.memory.total}.items()))

    def profile(self, stage: Stage, fast: bool, step: Step, curve: dict[int, float]) -> Profile:
        sizes = sorted({*BATCHES, stage.settings.trainer.batch_size})
        answers = {n: self.tracer.inference(stage, fast, n, ANSWER_TOKENS).total for n in (1, 32)}
        flops = {f"{part}, {phase}": value / 1e9 for (part, phase), value in step.flops.items()}
        if step.encoding is not None:
            flops["vision, once for each picture"] = step.encoding_flops_per_sample / 1e9
        return Profile(
            "bfloat16" if runs_bf16(stage.settings.trainer, fast) else "float32",
            flops,
            step.flops_per_sample / 1e9,
            {**asdict(step.memory), "total": step.memory.total},
            {n: at(curve, n) / 1e9 for n in sizes if n >= min(curve)},
            {n: at(answers, n) / 1e9 for n in sizes},
        )

    def estimate(self, stage: Stage, device: Device | None, step: Step, curve: dict[int, float]) -> Estimate:
        trainer = stage.settings.trainer
        rate = self.rate(stage, device, step)
        hours = step.work.num_samples / rate / 3600 + self.encoding_hours(stage, device, step)
        if device is None:
            assert self.machine is not None
            share = 1 / trainer.devices if choose_device(trainer.device).type == "cpu" else USABLE_SHARE
            usable, name, price = share * self.machine.memory_gb * 1e9, HERE, None
        else:
            usable, name, price = device.usable_bytes, device.name, device.price
        world = trainer.devices * trainer.num_nodes
        dollars = None if price is None else hours * price * world
        fits = step.memory.total <= usable
        return Estimate(name, rate, hours, dollars, step.memory.total / 1e9, fits, largest(curve, usable))

    def rate(self, stage: Stage, device: Device | None, step: Step) -> float:
        """Samples a second, of all devices of the run."""
        trainer = stage.settings.trainer
        if device is not None:
            seconds = device.step_seconds(step.calls, step.num_ops, step.trainable)
            return step.samples * trainer.devices * trainer.num_nodes / seconds
        here = choose_device(trainer.device)
        calls = [*step.calls, *(step.encoding.calls if step.encoding is not None else [])]
        self.machine = probe(calls, trainer.device, self.seconds, self.fresh)
        self.fresh = False
        seconds = self.machine.step_seconds(step.calls, step.num_ops, step.trainable)
        if self.seconds > 0:
            self.real[stage.name] = self.rehearsed(stage, step, seconds, here)
        seconds *= self.real.get(stage.name, Real()).share
        loading = step.samples * self.loading(stage, step)
        workers = num_workers_of(trainer, here)
        seconds = max(seconds, loading / workers) if workers else seconds + loading
        shared_by = trainer.devices if here.type == "cpu" else 1  # processes on the same cores
        return step.samples * trainer.devices * trainer.num_nodes / seconds / shared_by

    def rehearsed(self, stage: Stage, step: Step, seconds: float, here: torch.device) -> Real:
        """A few real steps, where they fit and one does not take longer than all of them may."""
        if seconds > self.seconds or not fits(step, here):
            return Real()
        parts = self.tracer.empty_parts(stage, self.fast_here)
        fill(parts, here)
        bf16 = runs_bf16(stage.settings.trainer, self.fast_here)
        share = rehearse(parts, stage, step, bf16, here, self.seconds) * step.samples / seconds
        if step.encoding is None:
            return Real(share)
        return Real(share, rehearse_encoding(parts, here, ENCODED_AT_ONCE, bf16))

    def loading(self, stage: Stage, step: Step) -> float:
        """Seconds to read a sample here; 0 where the data is not here."""
        parts, _ = self.tracer.parts(stage, self.fast_here)
        return loading_seconds(stage.settings, stage.kind, parts, self.tracer.reader, opens=step.encoding is None)

    def encoding_hours(self, stage: Stage, device: Device | None, step: Step) -> float:
        """For the features of all pictures, if they are computed beforehand."""
        if step.encoding is None:
            return 0.0
        real = self.real.get(stage.name, Real()).encoding_s
        if device is None and real is not None:
            return real * step.work.num_pictures / 3600
        place = device or self.machine
        assert place is not None
        batch = place.step_seconds(step.encoding.calls, step.encoding.num_ops, 0)
        return batch / ENCODED_AT_ONCE * step.work.num_pictures / 3600

    def switches(self, stage: Stage, step: Step) -> list[SwitchEffect]:
        """Effects on the first device; here, of operations that were not timed, at the rates of those that were."""
        device, seconds = self.devices[0], self.seconds
        self.seconds = 0.0
        fast_first = self.is_fast(stage, device)
        found = []
        for name, other, fast in [("as planned", stage, fast_first), *variations(stage, step, fast_first)]:
            own = step if other is stage else self.tracer.step(other, fast)
            gflop, memory = own.flops_per_sample / 1e9, own.memory.total / 1e9
            found.append(SwitchEffect(name, own.trainable, gflop, memory, self.rate(other, device, own)))
        self.seconds = seconds
        return found


def at(curve: dict[int, float], size: int) -> float:
    """The value at a batch size, on the line through its neighbours, or through the last two."""
    sizes = sorted(curve)
    low = max((n for n in sizes[:-1] if n <= size), default=sizes[0])
    high = next(n for n in sizes if n > low)
    return curve[low] + (curve[high] - curve[low]) * (size - low) / (high - low)


def largest(curve: dict[int, float], limit: float) -> int | None:
    """The largest batch that needs at most so many bytes; None if not even the smallest does."""
    sizes = sorted(curve)
    if at(curve, sizes[0]) > limit:
        return None
    size = sizes[0]
    while at(curve, 2 * size) <= limit and size < 2**20:
        size *= 2
    step = size
    while step > 1:
        step //= 2
        if at(curve, size + step) <= limit:
            size += step
    return size
