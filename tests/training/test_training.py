"""What a step does: token-correct accumulation, frozen parts, divergence, precision, the schedule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eyespot
from eyespot.config import ConfigError, TrainerSettings
from eyespot.training.module import TrainingStopped
from eyespot.training.optim import adamw, learning_rate_factor, parameter_groups
from eyespot.training.run import Run, compose_settings, precision_of, train
from tiny import make_vlm

pytestmark = pytest.mark.filterwarnings("ignore")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.model_folder / "model.safetensors")


@pytest.mark.parametrize("packing", ["true", "false"])
def test_accumulation_gives_the_weights_of_one_large_batch(run: Callable[..., Run], packing: str) -> None:
    common = [f"data.packing={packing}", "trainer.max_steps=3", "data.share=1", "trainer.eps=1e-2"]
    one = run("one", *common, "trainer.batch_size=8", "trainer.accumulate=1")
    four = run("four", *common, "trainer.batch_size=2", "trainer.accumulate=4")
    for (name, a), b in zip(weights(one).items(), weights(four).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert [step for step, _ in one.curve] == [1, 2, 3]
    assert [loss for _, loss in four.curve] == pytest.approx([loss for _, loss in one.curve], rel=1e-5)


def test_packed_training_equals_padded_training(run: Callable[..., Run]) -> None:
    packed, padded = (
        run(f"p{p}", f"data.packing={p}", "data.share=1", "trainer.max_steps=3", "trainer.eps=1e-2")
        for p in ("true", "false")
    )
    assert [loss for _, loss in packed.curve] == pytest.approx([loss for _, loss in padded.curve], rel=1e-5)


def test_gradient_checkpointing_changes_nothing(run: Callable[..., Run]) -> None:
    plain, saved = (
        run(f"g{g}", f"trainer.gradient_checkpointing={g}", "trainer.max_steps=2") for g in ("false", "true")
    )
    assert plain.curve == saved.curve


def test_frozen_parts_keep_every_bit_and_trained_parts_change(run: Callable[..., Run]) -> None:
    start, end = (
        weights(
            run(f"steps{steps}", "model.vision.train=frozen", f"trainer.max_steps={steps}", "trainer.warmup_share=0")
        )
        for steps in (1, 3)
    )
    for name, tensor in start.items():
        same = torch.equal(tensor, end[name])
        assert same == name.startswith("vision."), name


def test_an_unfrozen_encoder_changes_in_one_step() -> None:
    model = make_vlm()
    model.set_trainable(vision="full", connector="full", language="full")
    before = {name: p.detach().clone() for name, p in model.vision.named_parameters()}
    optimizer = adamw(model, {"vision": 1e-3, "connector": 1e-3, "language": 1e-3}, 0.0, [0.9, 0.999], 1e-8)
    ids = torch.tensor([[1, 64, 64, 64, 64, 2, 3]])
    model(
        input_ids=ids, labels=ids.masked_fill(ids == 64, -100), pixel_values=torch.randn(1, 3, 16, 16)
    ).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.vision.named_parameters())


def test_divergence_stops_with_step_samples_and_last_checkpoint(run: Callable[..., Run]) -> None:
    with pytest.raises(
        TrainingStopped, match=r"(nan|inf) at step \d+; samples easy_vqa-train.*last good checkpoint: .*step-"
    ):
        run("diverges", "trainer.lr={vision: 1e9, connector: 1e9, language: 1e9}", "trainer.checkpoint_every=1",
            "trainer.clip=1e9", "trainer.epochs=20", "trainer.warmup_share=0.0",
            "trainer.validate_every=1000")  # fmt: skip


def test_one_sample_is_learned_by_heart_from_its_first_letter_to_its_end(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    row = {"id": "r", "image": "red.png", "question": "what is it?", "answer": "A red square!"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    source = f"{{format: vqa, path: {tmp_path / 'q.jsonl'}}}"
    settings = compose_settings(
        ["recipe=smoke", f"output_dir={tmp_path / 'runs'}", f"data.train={source}", f"data.test={source}",
         "data.validation_share=0", "data.limit=null", "trainer.epochs=400", "trainer.decay=constant",
         "trainer.lr={vision: 3e-3, connector: 3e-3, language: 3e-3}", "trainer.samples_every=1000",
         "evaluation.run=false"]
    )  # fmt: skip
    result = train(settings)
    assistant = eyespot.load(result.model_folder, device="cpu")
    assert assistant.ask(str(tmp_path / "red.png"), "what is it?", max_new_tokens=40) == "A red square!"
    assert "".join(assistant.stream(str(tmp_path / "red.png"), "what is it?", max_new_tokens=40)) == "A red square!"


def test_a_run_leaves_curves_samples_and_a_record(run: Callable[..., Run]) -> None:
    folder = run("files", "trainer.samples_every=1").folder
    header = (folder / "logs" / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "samples_per_s", "tokens_per_s", "lr/vision", "train/grad_norm"} <= set(header.split(","))
    assert list((folder / "logs" / "tensorboard").glob("events*"))
    shown = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {"step", "id", "answer", "truth"} == set(shown[0])
    record = json.loads((folder / "model" / "training.json").read_text())
    assert record["settings"]["name"] == "files"
    assert record["samples"] >= record["steps"] == record["curve"][-1][0]


def test_early_stopping_ends_a_run(run: Callable[..., Run]) -> None:
    result = run("early", "trainer.patience=1", "trainer.lr={vision: 0.0, connector: 0.0, language: 0.0}",
                 "trainer.validate_every=1", "trainer.epochs=5")  # fmt: skip
    assert result.steps == 2


@pytest.mark.parametrize(("decay", "end"), [("linear", 0.1), ("cosine", 0.0245), ("constant", 1.0)])
def test_learning_rate_schedule(decay: str, end: float) -> None:
    factors = [learning_rate_factor(step, 20, 0.5, decay) for step in range(20)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[-1] == pytest.approx(end, abs=1e-3)


def test_parameters_are_grouped_by_part_and_vectors_do_not_decay() -> None:
    model = make_vlm()
    model.set_trainable(vision="frozen", connector="full", language="full")
    groups = parameter_groups(model, {"vision": 1, "connector": 2, "language": 3}, 0.1)
    assert {(g["name"], g["lr"], g["weight_decay"]) for g in groups} == {
        ("connector-True", 2, 0.1), ("connector-False", 2, 0.0), ("language-True", 3, 0.1), ("language-False", 3, 0.0),
    }  # fmt: skip
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())  # type: ignore[arg-type]


def test_bfloat16_parameters_are_never_trained() -> None:
    model = make_vlm()
    model.connector.to(torch.bfloat16)
    model.set_trainable(vision="frozen", connector="full", language="frozen")
    with pytest.raises(ValueError, match="rounds small steps to zero"):
        parameter_groups(model, {"connector": 1e-3}, 0.0)


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="every part is frozen"):
        compose_settings(["recipe=smoke", *(f"model.{p}.train=frozen" for p in ("vision", "connector", "language"))])


def test_precision_names() -> None:
    cpu = torch.device("cpu")
    assert precision_of(TrainerSettings(precision="bf16"), cpu) == "bf16-mixed"
    assert precision_of(TrainerSettings(precision="fp32"), cpu) == "32-true"
    assert precision_of(TrainerSettings(precision="auto"), torch.device("mps")) == "32-true"


def test_training_in_bfloat16_runs(run: Callable[..., Run]) -> None:
    losses = [loss for _, loss in run("bf16", "trainer.precision=bf16", "trainer.max_steps=2").curve]
    exact = [loss for _, loss in run("fp32", "trainer.max_steps=2").curve]
    assert losses == pytest.approx(exact, rel=0.02)
    assert losses != exact


def test_a_tokenizer_learned_from_the_texts_travels_with_the_run(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / "cache"))
    result = run("learned", "model.language.tokenizer=bpe:300", "trainer.checkpoint_every=2")
    checkpoint = sorted((result.folder / "checkpoints").glob("step-*"))[0].rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "cache")
    for folder in (result.model_folder, checkpoint):
        tokenizer = eyespot.load(folder, device="cpu").processor.tokenizer
        assert len(tokenizer) <= 300
        assert len(tokenizer("what color is the shape?", add_special_tokens=False).input_ids) < 12
    assert json.loads((result.folder / "settings.json").read_text())["model"]["language"]["tokenizer"] == "bpe:300"


@pytest.mark.parametrize("size", ["10", "many"])
def test_an_impossible_vocabulary_is_an_error(run: Callable[..., Run], size: str) -> None:
    with pytest.raises(ConfigError, match=f"model.language.tokenizer 'bpe:{size}'"):
        run("small", f"model.language.tokenizer=bpe:{size}")
