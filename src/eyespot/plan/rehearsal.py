"""Some real steps of a run on this machine, with made-up weights and pictures. They show what operations timed alone do
not: numbers that are no longer in the cache, kernels made anew for every new shape, the allocator, Python's share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from eyespot.models.vlm import PARTS
from eyespot.plan.batches import Batch
from eyespot.plan.machine import memory_of
from eyespot.plan.skeleton import Skeleton
from eyespot.plan.steps import Stage, Step, loss_of, with_pictures
from eyespot.plan.trace import with_tensors
from eyespot.training.optim import adamw

LEAST_STEPS = 3  # the first one, which is not timed, among them
MEMORY_SHARE = 0.5  # of this machine's memory: a step that needs more is not rehearsed
WEIGHTS = 0.03  # the made-up ones are at most so large


def fits(step: Step, device: torch.device) -> bool:
    """Whether a step may be rehearsed on a device."""
    return step.memory.total <= MEMORY_SHARE * memory_of(device)


def rehearse(parts: Skeleton, stage: Stage, step: Step, bf16: bool, device: torch.device, seconds: float) -> float:
    """Seconds for a sample, loading excluded.

    Args:
        parts: of the stage, filled with numbers and set up as for training. step: as it was traced.
        bf16: matrix products in bfloat16 over float32 weights. seconds: for all steps; more where three take longer.
    """
    trainer = stage.settings.trainer
    loss = loss_of(stage, parts.model)
    rates = dict.fromkeys(PARTS, 1e-6)
    optimizer = adamw(parts.model, rates, trainer.weight_decay, trainer.betas, trainer.eps)
    learning = [p for p in parts.model.parameters() if p.requires_grad]
    samples, spent, deadline = 0, 0.0, time.perf_counter() + seconds
    for number, (batches, count) in enumerate(_steps(step, trainer.accumulate)):
        if number >= LEAST_STEPS and time.perf_counter() > deadline:
            break
        shown = [_moved(with_pictures(batch, parts, step.encoding is not None, bf16), device) for batch in batches]
        start = _now(device)
        for batch in shown:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value = loss(batch)
            value.backward()
        torch.nn.utils.clip_grad_norm_(learning, trainer.clip)
        optimizer.step()
        optimizer.zero_grad()
        if number > 0:
            samples, spent = samples + count, spent + _now(device) - start
    return spent / samples


def rehearse_encoding(parts: Skeleton, device: torch.device, pictures: int, bf16: bool) -> float:
    """Seconds for a picture whose features are computed beforehand; parts hold numbers already."""
    pixels = torch.rand(pictures, 3, parts.image_size, parts.image_size, device=device)
    times = []
    for _ in range(2):
        start = _now(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            parts.model.encode_images(pixels)
        times.append(_now(device) - start)
    return times[-1] / pictures


def fill(parts: Skeleton, device: torch.device) -> None:
    """Numbers in the place of a model's empty tensors: small weights by chance, ones where it scales, places 0."""

    def filled(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if not tensor.dtype.is_floating_point:
            return empty.zero_()
        return empty.fill_(1.0) if tensor.dim() < 2 else empty.uniform_(-WEIGHTS, WEIGHTS)

    with torch.no_grad():
        with_tensors(parts.model, filled)


def _steps(step: Step, accumulate: int) -> Iterator[tuple[list[Batch], int]]:
    """The micro-batches of each optimizer step and its samples; the first one comes twice."""
    found = step.work.batches
    groups = [found[start : start + accumulate] for start in range(0, len(found), accumulate)]
    for group in itertools.chain(groups[:1], groups):
        yield [batch.tensors for batch in group], sum(batch.samples for batch in group)


def _moved(batch: Batch, device: torch.device) -> Batch:
    """On a device, with numbers in the place of pictures."""
    made = {}
    for name, tensor in batch.items():
        there = tensor.to(device)
        made[name] = torch.rand_like(there) if name in ("pixel_values", "image_features") else there
    return made


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
