"""Traces of models without numbers beside the same passes with numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from eyespot.models.vlm import VLM
from eyespot.plan.trace import CPU_ATTENTION, Trace, as_fake, bytes_of, trace_inference, trace_training
from tiny import ENCODERS, LANGUAGES, make_vlm, training_batch

FROZEN: dict[str, Any] = {"vision": "frozen", "connector": "full", "language": "frozen"}
ALL: dict[str, Any] = {"vision": "full", "connector": "full", "language": "full"}


def traced(model: VLM, batch: dict[str, Tensor], **how: Any) -> Trace:
    """Of a copy of the model in which there is nothing."""
    fake, mode = copy.deepcopy(model), FakeTensorMode(allow_non_fake_inputs=True)
    as_fake(fake, mode)
    with mode:
        pictures = {"pixel_values": torch.empty(batch["pixel_values"].shape)}
        loss = lambda batch: fake(**batch, num_items_in_batch=1).loss  # noqa: E731
        return trace_training(fake, {**batch, **pictures}, loss, **{"bf16": False, "accumulates": False, **how})


def counted(model: VLM, batch: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("language", list(LANGUAGES))
def test_flops_of_every_language_model(language: str) -> None:
    model = make_vlm(language).train()
    assert traced(model, training_batch()).total_flops == counted(model, training_batch())


@pytest.mark.parametrize("vision", list(ENCODERS))
def test_flops_of_every_encoder(vision: str) -> None:
    model = make_vlm(vision=vision).train()
    assert traced(model, training_batch()).total_flops == counted(model, training_batch())


def test_flops_by_part() -> None:
    """A frozen encoder is passed once, and the parts add up to the whole."""
    model = make_vlm()
    model.set_trainable(**ALL)
    whole = traced(model.train(), training_batch())
    model.set_trainable(**FROZEN)
    frozen = traced(model.train(), training_batch())
    assert set(whole.flops) == {(part, phase) for part in ("vision", "connector", "language") for phase in
                                ("forward", "backward")} | {("head and loss", "forward")}  # fmt: skip
    assert frozen.flops["vision", "forward"] == whole.flops["vision", "forward"]
    assert ("vision", "backward") not in frozen.flops
    assert frozen.flops["language", "backward"] < 0.7 * whole.flops["language", "backward"]
    assert 1.5 < whole.flops["vision", "backward"] / whole.flops["vision", "forward"] < 2.1
    assert whole.total_flops == counted_all(model)


def counted_all(model: VLM) -> int:
    model.set_trainable(**ALL)
    return counted(model.train(), training_batch())


def test_adapters_and_checkpointing() -> None:
    model = make_vlm(lora={"language": {"r": 4, "alpha": 8, "targets": "all"}})
    model.set_trainable(vision="frozen", connector="full", language="lora")
    plain = traced(model.train(), training_batch())
    assert plain.total_flops == counted(model, training_batch())
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again = traced(model, training_batch())
    assert again.total_flops == counted(model, training_batch())
    assert again.total_flops > plain.total_flops and again.memory.activations < plain.memory.activations


@pytest.mark.parametrize("modes", [ALL, FROZEN])
def test_memory_is_what_the_allocator_gives(modes: dict[str, Any]) -> None:
    """The peak of a real pass, as torch's profiler sees every allocation, within a tenth."""
    model = make_vlm()
    model.set_trainable(**modes)
    batch = wide(training_batch())
    model.train()
    model(**batch).loss.backward()  # what is made once
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**batch).loss.backward()
    memory = traced(model, batch).memory
    own = sum(tensor.untyped_storage().nbytes() for tensor in batch.values())
    assert memory.weights == bytes_of((*model.parameters(), *model.buffers()))
    planned = memory.gradients + memory.activations - own
    assert planned == pytest.approx(peak_of(profiler), rel=0.1)


def peak_of(profiler: Any) -> int:
    """Bytes at most, above those at the beginning."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def wide(batch: dict[str, Tensor], times: int = 24) -> dict[str, Tensor]:
    """More rows, so that activations outweigh what an operation keeps for itself."""
    return {name: tensor.repeat(times, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}


def test_memory_grows_with_the_batch_and_gradients_that_are_there() -> None:
    model = make_vlm()
    model.set_trainable(**ALL)
    small, large = (traced(model, wide(training_batch(), n)).memory for n in (1, 4))
    assert large.activations > 2 * small.activations and large.weights == small.weights
    assert large.optimizer == 2 * sum(p.numel() * 4 for p in model.parameters())
    first, later = (traced(model, wide(training_batch()), accumulates=later).memory for later in (False, True))
    assert later.gradients == later.optimizer / 2 and later.total > first.total


def test_half_precision_keeps_half_as_much() -> None:
    model = make_vlm()
    exact, half = (traced(model, wide(training_batch()), bf16=bf16) for bf16 in (False, True))
    assert half.memory.activations < 0.9 * exact.memory.activations and half.total_flops == exact.total_flops
    exactly = sum(call.flops * call.count for call in half.calls if call.dtype != torch.bfloat16)
    assert exactly < 1e-3 * half.total_flops  # transformers before 5.23 multiplies rotary angles in float32


def test_inference_memory_grows_with_batch_and_answer() -> None:
    fake, mode = make_vlm(), FakeTensorMode(allow_non_fake_inputs=True)
    as_fake(fake, mode)

    def peak(rows: int, new: int) -> float:
        ids = torch.tensor([[64] * 4 + [1] * 8] * rows)
        with mode:
            batch = {"input_ids": ids, "pixel_values": torch.empty(rows, 3, 16, 16)}
            return trace_inference(fake, batch, new, bf16=False).memory.total

    assert peak(1, 1) <= peak(1, 64) < peak(8, 64) and peak(1, 1) < peak(8, 1)


def test_tied_weights_stay_tied() -> None:
    model, mode = make_vlm("gemma3"), FakeTensorMode()
    before = bytes_of(model.parameters())
    as_fake(model, mode)
    assert bytes_of(model.parameters()) == before
