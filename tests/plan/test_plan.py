"""Plans of small recipes: what is read, what is assumed, what is said, and what follows a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eyespot.cli import main
from eyespot.compose import build_from_settings
from eyespot.config import ConfigError
from eyespot.models.parameters import count_parameters
from eyespot.plan import make, rehearsal
from eyespot.plan.batches import PUBLISHED_DATA, Assumed, Reader, published, workload
from eyespot.plan.devices import DEVICES, choose
from eyespot.plan.machine import Machine, key_of, probe, time_call
from eyespot.plan.make import Estimate, Plan, StagePlan, at, largest
from eyespot.plan.rehearsal import fill, fits, rehearse
from eyespot.plan.steps import Step, Tracer, packed_memory, stages_of
from eyespot.plan.trace import Call, Memory, Spec
from eyespot.training.run import compose_settings

pytest.importorskip("easy_vqa")
ASSUMED = Assumed(1000, 40, 20)
TINY = ["recipe=smoke", "data.limit=48"]


def steps_of(*overrides: str, assumed: Assumed | None = ASSUMED, fast: bool = False) -> Step:
    [stage] = stages_of(compose_settings([*TINY, *overrides]))
    return Tracer(assumed).step(stage, fast)


# --- what is read ------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_run() -> None:
    """The same rows that training reads, pictures aside."""
    settings = compose_settings(TINY)
    [stage] = stages_of(settings)
    parts, _ = Tracer().parts(stage, False)
    work = workload(settings, "instruct", parts, Reader())
    assert work.is_read and 30 <= work.num_samples <= 48 and work.typical.cells <= work.widest.cells
    assert work.num_steps * work.samples == pytest.approx(work.num_samples, rel=0.2)
    first = work.batches[0].tensors
    assert first["image_features"].shape[1] == 0 and {"documents", "branches", "previous"} <= set(first)
    assert len(first["image_features"]) <= work.batches[0].samples


def test_accumulation_and_devices_share_the_data() -> None:
    one, four = steps_of(), steps_of("trainer.accumulate=2", "trainer.devices=2")
    assert four.work.num_steps == -(-one.work.num_steps // 4) and four.samples == 2 * one.samples
    assert four.num_ops == 2 * one.num_ops


def test_assumed_data() -> None:
    step = steps_of()
    batch = step.work.typical.tensors
    assert not step.work.is_read and step.work.typical.samples == 8
    assert int((batch["labels"] != -100).sum()) == 8 * 20
    padded = steps_of("data.packing=false").work.typical.tensors
    assert padded["input_ids"].shape == (8, 16 + 40)


def test_data_that_is_not_here(tmp_path: Path) -> None:
    known = compose_settings(["recipe=gemma270m_llava"]).data
    assert published(known) == PUBLISHED_DATA["llava_instruct_150k.json"]
    known.limit = 1000
    assert published(known).samples == 1000
    known.train = {"format": "llava", "path": str(tmp_path / "none.json")}
    with pytest.raises(ConfigError, match=r"none\.json.*--assume SAMPLES TEXT LEARNED"):
        published(known)


# --- what a step costs -------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_built_model() -> None:
    settings = compose_settings(TINY)
    model, _ = build_from_settings(settings.model)
    assert steps_of().parameters == count_parameters(model)


def test_switches_move_cost_where_they_should() -> None:
    frozen = steps_of("model.vision.train=frozen", "data.cache_features=false")
    kept = steps_of("model.vision.train=frozen")
    trained = steps_of()
    assert kept.encoding is not None and frozen.encoding is None and trained.encoding is None
    assert kept.flops_per_sample <= frozen.flops_per_sample < trained.flops_per_sample
    assert kept.encoding_flops_per_sample > 0 and not any(part == "vision" for part, _ in kept.flops)
    half = steps_of("trainer.precision=auto", fast=True)
    assert half.memory.activations < trained.memory.activations
    twice = steps_of("trainer.batch_size=16")
    assert twice.memory.total > trained.memory.total
    assert twice.flops_per_sample == pytest.approx(trained.flops_per_sample, rel=0.02)


def test_a_cache_that_is_too_small_is_no_cache() -> None:
    assert steps_of("model.vision.train=frozen", "data.cache_gb=1e-9").encoding is None


def test_several_devices() -> None:
    one = steps_of().memory
    copied = steps_of("trainer.devices=2", "trainer.batch_size=4").memory
    spread = steps_of("trainer.devices=2", "trainer.strategy=fsdp").memory
    assert spread.weights == one.weights / 2 and spread.optimizer == one.optimizer / 2
    assert copied.weights == one.weights


def test_four_bits() -> None:
    """Of Llama 3 8B, 7 billion weights in 32 layers need 0.52 bytes in place of 2."""
    settings = compose_settings(["recipe=qformer_two_stage"])
    instruct = stages_of(settings)[1]
    tracer = Tracer()
    parts, _ = tracer.parts(instruct, True)
    layers = sum(
        p.numel() for name, p in parts.model.language.named_parameters() if "proj" in name and "lora" not in name
    )
    assert layers == pytest.approx(6.98e9, rel=0.01)
    whole = Memory(17e9, 0, 0, 0)
    instruct.settings.model.language.quantize = "nf4"
    saved = whole.total - packed_memory(whole, parts.model, instruct.settings.model).total
    assert saved == pytest.approx(layers * 1.48, rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [("qformer_two_stage", ["joint", "instruct"]), ("scenes", ["detect", "instruct", "instruct"])],
)
def test_every_kind_of_stage(recipe: str, kinds: list[str]) -> None:
    """Each learns what it should, with its own losses on its own data."""
    pytest.importorskip("emoji")
    settings = compose_settings([f"recipe={recipe}", "+shrink=true", "trainer.devices=1"])
    stages, tracer = stages_of(settings), Tracer()
    assert [stage.kind for stage in stages] == kinds
    for stage in stages:
        step = tracer.step(stage, False)
        learning = {row.part for row in step.parameters if row.trainable} - {"model"}
        assert learning == {part for part, mode in stage.train.items() if mode != "frozen"}
        assert step.work.is_read and step.flops_per_sample > 0 and step.memory.optimizer == 8 * step.trainable
        passed_back = {part for part, phase in step.flops if phase == "backward"}
        assert passed_back >= learning - {"alignment", "detection"}
        assert ("language" in passed_back) == (stage.kind == "instruct")


def test_stages_add_up() -> None:
    estimates = [Estimate("H100", 10.0, hours, dollars, 1.0, True, 8) for hours, dollars in ((2.0, 8.0), (1.0, 4.0))]
    stages = [
        StagePlan(f"{i}", "instruct", {}, 1, 1, 1, 1, True, False, 0, estimates=[e]) for i, e in enumerate(estimates)
    ]
    assert Plan("two", stages, [], None, []).to_dict()["totals"] == [{"device": "H100", "hours": 3.0, "dollars": 12.0}]


# --- devices -----------------------------------------------------------------------------------------------------


def test_faster_devices_are_faster() -> None:
    step = steps_of()
    seconds = {name: device.step_seconds(step.calls, step.num_ops, step.trainable) for name, device in DEVICES.items()}
    assert seconds["H200"] <= seconds["H100"] <= seconds["A100-80"] <= seconds["A100-40"] <= seconds["A10"]
    heavy = [Call(None, (), {}, 1e15, 1e9, torch.bfloat16, 1)]
    assert DEVICES["H100"].step_seconds(heavy, 1, 0) == pytest.approx(1e15 / 989e12 / 0.5)
    assert all(device.specification.startswith("https://") for device in DEVICES.values())
    assert all("https://" in device.price_source and "2026-" in device.price_source for device in DEVICES.values())


def test_names_and_prices() -> None:
    [here, dear] = choose(["here", "H100=9.5"])
    assert here is None and dear is not None and dear.price == 9.5
    with pytest.raises(ValueError, match=r"unknown device 'V100'; choose here, A10, A100-40"):
        choose(["V100"])
    with pytest.raises(ValueError, match=r"price of 'H100=much' is no number"):
        choose(["H100=much"])


def test_curves() -> None:
    curve = {1: 10.0, 8: 80.0, 32: 320.0}
    assert [at(curve, n) for n in (1, 4, 8, 20, 64)] == [10.0, 40.0, 80.0, 200.0, 640.0]
    assert [largest(curve, limit) for limit in (9, 10, 85, 641)] == [None, 1, 8, 64]


def test_this_machine_is_measured_and_remembered() -> None:
    step = steps_of()
    heaviest = max(step.calls, key=lambda call: call.flops)
    machine = probe(step.calls, "cpu", seconds=0.3)
    assert machine.seconds[key_of(heaviest)] > 0 and machine.per_op_s >= 0 and machine.per_parameter_s > 0
    again = probe(step.calls, "cpu", seconds=0.0)
    assert again.seconds == machine.seconds
    total = machine.step_seconds(step.calls, step.num_ops, step.trainable)
    assert total > machine.step_seconds(step.calls[:1], 0, 0) > 0


def test_what_was_not_timed_goes_at_the_rate_of_what_was() -> None:
    timed = Call("mm", (1,), {}, 1e9, 1e6, torch.float32, 2)
    other = Call("mm", (2,), {}, 3e9, 1e6, torch.float32, 1)
    machine = Machine("m", 1, 8.0, {key_of(timed): 0.1})
    assert machine.step_seconds([timed, other], 0, 0) == pytest.approx(2 * 0.1 + 0.3)


def test_an_operation_that_wants_certain_numbers_is_not_timed() -> None:
    spec = Spec((4,), (1,), torch.float32)
    mask = Spec((4,), (1,), torch.bool)
    scatter = Call(torch.ops.aten.masked_scatter.default, (spec, mask, Spec((1,), (1,), torch.float32)), {}, 0, 1, None)
    assert time_call(scatter, torch.device("cpu")) is None
    add = Call(torch.ops.aten.add.Tensor, (spec, spec), {}, 0, 1, torch.float32)
    assert (time_call(add, torch.device("cpu")) or 0) > 0


# --- rehearsals --------------------------------------------------------------------------------------------------


def test_made_up_numbers_fill_a_model_and_ties_stay() -> None:
    [stage] = stages_of(compose_settings(TINY))
    parts = Tracer(ASSUMED).empty_parts(stage, False)
    tied = parts.model.get_output_embeddings().weight is parts.model.get_input_embeddings().weight
    number = sum(p.numel() for p in parts.model.parameters())
    assert all(p.is_meta for p in parts.model.parameters())
    fill(parts, torch.device("cpu"))
    for tensor in (*parts.model.parameters(), *parts.model.buffers()):
        assert not tensor.is_meta and bool(torch.isfinite(tensor).all())
    assert (parts.model.get_output_embeddings().weight is parts.model.get_input_embeddings().weight) == tied
    assert sum(p.numel() for p in parts.model.parameters()) == number
    assert any(p.std() > 0.01 for p in parts.model.parameters())


@pytest.mark.parametrize("overrides", [[], ["trainer.accumulate=2", "model.vision.train=frozen"]])
def test_a_rehearsal_takes_the_steps_of_the_run(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch once, the first step once more: each changes the weights that learn, and is counted."""
    [stage] = stages_of(compose_settings([*TINY, *overrides]))
    tracer = Tracer()
    step, parts = tracer.step(stage, False), tracer.empty_parts(stage, False)
    fill(parts, torch.device("cpu"))
    before = {name: p.clone() for name, p in parts.model.named_parameters()}
    clock = iter(range(10_000))
    monkeypatch.setattr(rehearsal, "_now", lambda device: float(next(clock)))
    assert fits(step, torch.device("cpu"))
    found = rehearse(parts, stage, step, False, torch.device("cpu"), 1e6)
    accumulate = stage.settings.trainer.accumulate
    samples = sum(batch.samples for batch in step.work.batches)
    assert found == pytest.approx(-(-len(step.work.batches) // accumulate) / samples)  # the clock ticks once a step
    for name, parameter in parts.model.named_parameters():
        frozen = not parameter.requires_grad
        assert frozen == (name.startswith("vision.") and bool(overrides))
        assert torch.equal(parameter, before[name]) or not frozen
    moved = [n for n, p in parts.model.named_parameters() if not torch.equal(p, before[n])]
    assert {name.split(".")[0] for name in moved} == {"vision", "connector", "language"} - (
        {"vision"} if overrides else set()
    )


def test_a_rehearsal_scales_what_is_said_about_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = compose_settings([*TINY, "data.cache_features=false", "model.vision.train=frozen"])
    for each in (0.5, 2.0):
        monkeypatch.setattr(make, "rehearse", lambda *given, each=each: each)
        plan = make.make_plan(settings, ["here", "H100"], seconds=0.2)
        here, rented = plan.stages[0].estimates
        assert here.samples_per_s == pytest.approx(1 / each, rel=0.05) and rented.samples_per_s > 100
        assert plan.stages[0].switches[0].samples_per_s == pytest.approx(1 / each, rel=0.05)
        monkeypatch.setattr(make, "rehearse_encoding", lambda *given: 36.0)
        monkeypatch.setattr(settings.data, "cache_features", True)
        kept = make.make_plan(settings, seconds=0.2, switches=False).stages[0]
        pictures = kept.samples / kept.estimates[0].samples_per_s / 3600 + kept.pictures / 100
        assert kept.estimates[0].hours == pytest.approx(pictures)
        monkeypatch.setattr(settings.data, "cache_features", False)
    monkeypatch.setattr(make, "fits", lambda *given: False)
    assert make.make_plan(settings, seconds=0.2, switches=False).stages[0].estimates[0].samples_per_s > 10


@pytest.mark.parametrize("devices", [1, 2])
def test_processes_on_one_processor_share_it(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own batch, and takes as many times as long."""
    monkeypatch.setattr(make, "probe", lambda *given: Machine("m", 2, 8.0))
    monkeypatch.setattr(make, "loading_seconds", lambda *given, **named: 1.0)
    settings = compose_settings([*TINY, f"trainer.devices={devices}"])
    stage = make.make_plan(settings, seconds=0.0, switches=False).stages[0]
    assert stage.estimates[0].samples_per_s == pytest.approx(1.0)


# --- the verb, and after a run -----------------------------------------------------------------------------------


def test_the_verb_and_what_a_run_says_at_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "has_fast_bfloat16", lambda device: False)
    words = [*TINY, "evaluation.run=false", "evaluation.pictures=0", f"output_dir={tmp_path}", "trainer.max_steps=2"]
    words.append("trainer.precision=auto")
    file = tmp_path / "plan.json"
    assert main(["plan", *words, "--devices", "here", "A100-80", "here", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    for phrase in (
        "parameters", "GB by batch size, float32", "GB by batch size, bfloat16", "what switches change (here)",
        "gradient checkpointing", "1.79 dollars an hour", "assumed, not measured",
    ):  # fmt: skip
        assert phrase in said
    values = json.loads(file.read_text())
    [stage] = values["stages"]
    assert [estimate["device"] for estimate in stage["estimates"]] == ["here", "A100-80"] and stage["steps"] == 2
    assert main(["train", *words]) == 0
    end = capsys.readouterr().err
    assert "planned and measured" in end and "samples/s" in end
    assert main(["train", *words, "name=other", "trainer.batch_size=4"]) == 0
    assert "`eyespot plan` with the same settings says it beforehand" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=smoke", "--devices", "TPU"], "unknown device 'TPU'"),
        (["recipe=smoke", "trainer.batch_size=0"], "batch_size is 0"),
        (["recipe=nowhere"], "unknown recipe 'nowhere'"),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
