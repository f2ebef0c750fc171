"""A model that cannot see is called out, one that sees is not; an explosion, endless words; looking changes nothing."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import eyespot
from eyespot.config import ConfigError, TrainerSettings
from eyespot.data.collate import Collator
from eyespot.data.sample import Sample, blind
from eyespot.processing.tokenizers import byte_tokenizer
from eyespot.training import run as run_module
from eyespot.training.callbacks import Reporter, looking_at
from eyespot.training.run import Run, compose_settings, train
from eyespot.training.watch import CALM_STEPS, Explosion, Lookout, Sight, interval, repeats
from started import said_by, tasks

pytestmark = pytest.mark.filterwarnings("ignore")
COLORS = {"r": (220, 30, 30), "g": (30, 200, 30), "b": (30, 30, 220)}
LORA = [
    "model.language.train=lora",
    "model.language.lora={r: 2, alpha: 4, targets: [q_proj, o_proj, up_proj, down_proj], dropout: 0.1}",
]


@pytest.fixture
def squares(tmp_path: Path) -> list[str]:
    """Settings of a run that can be answered with the picture only: which colour is it?"""
    draw = random.Random(0)
    rows = []
    for number in range(60):
        name = "rgb"[number % 3]
        color = tuple(min(255, channel + draw.randrange(30)) for channel in COLORS[name])
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "color?", "answer": name})
    (tmp_path / "squares.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        f"data.train={{format: vqa, path: {tmp_path / 'squares.jsonl'}}}", "data.limit=null",
        "data.validation_share=0.4", "trainer.validation_limit=24", "trainer.sight_every=20",
        "trainer.samples_every=1000", "trainer.validate_every=1000", "trainer.log_every=1000",
        "trainer.checkpoint_every=1000", "trainer.decay=constant", "trainer.warmup_share=0.1",
        "trainer.lr={vision: 3e-3, connector: 3e-3, language: 3e-3}",
    ]  # fmt: skip


@pytest.fixture
def blinded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the encoder says, the language model gets zeros."""
    composed = run_module._composed

    def without_sight(*arguments: Any) -> tuple[Any, Any]:
        model, processor = composed(*arguments)
        for parameter in model.connector.parameters():
            parameter.data.zero_()
        return model, processor

    monkeypatch.setattr(run_module, "_composed", without_sight)


BLIND = ["model.connector.train=frozen", "model.connector.calibrate=false"]


def test_a_model_that_sees_is_left_alone(run: Callable[..., Run], squares: list[str]) -> None:
    result = run("sees", *squares, "trainer.epochs=20")
    assert [look["step"] for look in result.looks] == [20, 40, 60, 80, 90]
    last = result.looks[-1]
    assert last["pictures"] == 24
    assert last["low"] > 0.5 and last["own"] + last["low"] < last["other"] < last["own"] + last["high"]
    assert result.warnings == []


def test_a_model_that_cannot_see_is_called_out(run: Callable[..., Run], squares: list[str], blinded: None) -> None:
    result = run("blinded", *squares, *BLIND, "trainer.epochs=12", "trainer.sight_every=10")
    (warning,) = result.warnings
    assert (warning["kind"], warning["step"]) == ("sight", 20)  # the first step of the last two thirds
    last = result.looks[-1]
    assert last["own"] == last["other"] and last["low"] == last["high"] == 0
    assert last["own"] < 1.0  # it did learn which letters are answers
    for words in ("no sign that the model uses the picture: loss", "unfreeze the connector", "eyespot inspect data"):
        assert words in warning["text"]
    record = json.loads((result.model_folder / "training.json").read_text())
    assert record["warnings"] == [warning] and record["looks"] == result.looks
    header = (result.folder / "logs" / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert {"sight/own", "sight/other", "sight/blind"} <= set(header.split(","))


@pytest.mark.parametrize("overrides", [[], LORA], ids=["full", "lora-with-dropout"])
def test_looking_changes_no_weight(run: Callable[..., Run], squares: list[str], overrides: list[str]) -> None:
    common = [*squares, *overrides, "trainer.samples_every=3"]
    looked, unlooked = (run(f"look{every}", *common, f"trainer.sight_every={every}") for every in (1, 0))
    assert len(looked.looks) == looked.steps and unlooked.looks == []
    one, other = (load_file(result.model_folder / "model.safetensors") for result in (looked, unlooked))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert looked.curve == unlooked.curve


def test_looking_is_without_dropout_and_leaves_no_trace() -> None:
    model = torch.nn.Dropout(0.5)
    torch.manual_seed(0)
    drawn = torch.rand(4), random.Random(0).random()
    torch.manual_seed(0)
    random.seed(0)
    with pytest.raises(KeyError), looking_at(model):
        assert torch.equal(model(torch.ones(99)), torch.ones(99))
        torch.rand(9), random.random()
        raise KeyError
    assert model.training
    assert torch.equal(torch.rand(4), drawn[0]) and random.random() == drawn[1]


def test_a_resumed_run_has_the_looks_and_warnings_of_an_uninterrupted_one(
    run: Callable[..., Run], squares: list[str], blinded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*squares, *BLIND, *LORA, "trainer.epochs=2", "trainer.sight_every=2", "trainer.checkpoint_every=3"]
    whole = run("whole", *common)
    report = Reporter.on_train_batch_end

    def lose_power(reporter: Reporter, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == 8:
            raise KeyError("power")
        report(reporter, trainer, *arguments)

    monkeypatch.setattr(Reporter, "on_train_batch_end", lose_power)
    with pytest.raises(KeyError, match="power"):
        run("killed", *common)
    monkeypatch.setattr(Reporter, "on_train_batch_end", report)
    resumed = run("killed", *common)
    assert whole.steps == 9 and [warning["step"] for warning in whole.warnings] == [4]
    assert (resumed.looks, resumed.warnings) == (whole.looks, whole.warnings)
    one, other = (load_file(result.model_folder / "model.safetensors") for result in (resumed, whole))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_look_is_what_the_model_says_of_each_sample_alone() -> None:
    """Of unequal answers, one of them about two pictures; a picture that came before is not taken again."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
        {"name": "linear"},
        {"name": "gpt", "args": {"max_position_embeddings": 96, **sizes}, "tokenizer": "byte"},
    )
    pictures = [Image.new("RGB", (16, 16), (20 * number, 0, 99)) for number in range(12)]
    samples = [Sample.question(str(n), pictures[n], "hm?", "word " * (1 + n % 3)) for n in range(10)]
    samples.insert(3, Sample.question("two", (pictures[10], pictures[11]), "which?", "both"))
    again = Sample.question("again", pictures[4], "what?", "no")
    sight = Sight([again, blind(again), *samples], Collator(processor), 64)
    chosen = {sample.id for sample in sight.samples}
    assert len(chosen & {"4", "again"}) == 1 and chosen | {"4", "again"} == {"again", *(s.id for s in samples)}

    def loss(sample: Sample) -> float:
        return float(model(**Collator(processor)([[sample]]).batches[0]).loss)

    model.eval()
    look = sight.look(model, 7)
    given = [image for sample in sight.samples for image in sample.images]
    others = iter([*given[-2:], *given[:-2]])
    exchanged = [replace(s, images=tuple(next(others) for _ in s.images)) for s in sight.samples]
    for before, after in zip(sight.samples, exchanged, strict=True):
        assert not set(map(id, before.images)) & set(map(id, after.images))
    for found, side in ((look.own, sight.samples), (look.other, exchanged), (look.blind, map(blind, sight.samples))):
        assert found == pytest.approx(mean(map(loss, side)), rel=1e-5)
    assert (look.low + look.high) / 2 == pytest.approx(look.other - look.own, abs=1e-5)
    assert look.step == 7 and look.pictures == len(sight.samples) == 11


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_look_once_and_see_the_same(
    run: Callable[..., Run], squares: list[str], tmp_path: Path, strategy: str
) -> None:
    common = [*squares, "trainer.epochs=1", "trainer.sight_every=2", "trainer.eps=1e-2", "data.share=1"]
    one = run("one", *common)
    two = ["recipe=smoke", "name=two", *common, f"output_dir={tmp_path}", "trainer.devices=2", "trainer.batch_size=4"]
    two += [f"trainer.strategy={strategy}", "evaluation.run=false", "trainer.device=cpu"]
    said = said_by(tasks("train", *two))
    looks = json.loads((tmp_path / "two" / "model" / "training.json").read_text())["looks"]
    assert [said.count(f"step {step}: loss") for step in (2, 4, 5)] == [1, 1, 1]
    assert len(looks) == 3
    for ours, theirs in zip(one.looks, looks, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


def test_too_few_pictures_are_said(squares: list[str], tmp_path: Path) -> None:
    said = io.StringIO()
    settings = compose_settings(["recipe=smoke", f"output_dir={tmp_path}", *squares, "trainer.validation_limit=7"])
    assert train(settings, console=Console(file=said, width=200)).looks == []
    assert "the validation has 7 that can be exchanged, 8 are needed" in said.getvalue()


@pytest.mark.parametrize("rate", [1, 10, 100])  # beyond these the run ends, because gradients are infinite
def test_a_learning_rate_far_too_high_is_called_out(run: Callable[..., Run], squares: list[str], rate: float) -> None:
    rates = f"trainer.lr={{vision: {rate}, connector: {rate}, language: {rate}}}"
    result = run("explodes", *squares, rates, "trainer.epochs=4", "trainer.sight_every=0")
    (warning,) = result.warnings
    assert warning["kind"] == "explosion" and warning["step"] < 10
    for words in (
        "the loss exploded: ",
        f"lower trainer.lr (now vision {rate},",
        "warmup_share=0.1",
        "trainer.clip=1.0",
    ):
        assert words in warning["text"]


def test_an_answer_without_end_is_called_out(run: Callable[..., Run], squares: list[str]) -> None:
    """An untrained model writes one letter for ever; while training is young, nobody minds."""
    rates = "trainer.lr={vision: 0.0, connector: 0.0, language: 0.0}"
    result = run("endless", *squares, rates, "trainer.samples_every=1", "trainer.sight_every=0")
    (warning,) = result.warnings
    assert result.steps == 5 and (warning["kind"], warning["step"]) == ("repetition", 2)
    assert "an answer repeats itself: squares:" in warning["text"] and "repetition_penalty" in warning["text"]


def test_stages_say_where_it_was(run: Callable[..., Run], squares: list[str]) -> None:
    stages = [
        f"{{name: {name}, kind: instruct, train: {{connector: full}}, trainer: {{samples_every: {every}}}}}"
        for name, every in (("loud", 1), ("still", 1000))
    ]
    rates = "trainer.lr={vision: 0.0, connector: 0.0, language: 0.0}"
    result = run("stages", *squares, rates, f"stages=[{', '.join(stages)}]", "trainer.sight_every=3")
    assert [warning["text"].split(": ")[:2] for warning in result.warnings] == [
        ["stage loud", "an answer repeats itself"],
        ["stage loud", "no sign that the model uses the picture"],
        ["stage still", "no sign that the model uses the picture"],
    ]
    assert [look["step"] for look in result.looks] == [3, 5]
    record = json.loads((result.model_folder / "training.json").read_text())
    assert (record["looks"], record["warnings"]) == (result.looks, result.warnings)


@pytest.mark.parametrize(
    ("answer", "truth", "bad"),
    [
        ("red " * 6, "red", True),
        ("red " * 4, "red", False),  # it ended by itself
        ("a red circle, on a field", "red", False),
        ("0 0 0 0 0 0 0 0 0 0 0 0", "1 1 1 1 1 1 1 1 1 1 1 1", False),  # so it was asked
    ],
)
def test_only_answers_that_were_cut_repeat_themselves(answer: str, truth: str, bad: bool) -> None:
    console = Console(quiet=True)
    lookout = Lookout(TrainerSettings(), 30, Reporter(1, console), None, byte_tokenizer())
    sample = Sample.question("a", Image.new("RGB", (8, 8)), "hm?", truth)
    for step in (9, 10, 11):  # a third of 30 is 10
        lookout.hear(step, [sample], [answer.strip()])
    assert [warning["step"] for warning in lookout.warnings] == [10] * bad


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("a red circle", False),
        ("", False),
        ("no no no", False),
        ("no no no no", True),
        ("the cat sat. the cat sat. the cat sat. the cat sat.", True),
        ("then the cat sat, the cat sat, the cat sat, the cat sat", False),  # the first time it is not the same
        ("so the cat sat, the cat sat, the cat sat, the cat sat, the cat sat, the", True),  # cut in the next one
        ("one two three four five six seven eight " * 4, True),
        ("one two three four five six seven eight nine " * 4, False),
        ("no no no no, it is red", False),
        ("100000", False),
        ("it cost 1000000000000", True),
        ("hahahahahahahahaha", True),
        ("很好很好很好很好很好很好很好很好", True),
        ("12 10 52 50", False),
    ],
)
def test_repeats(text: str, repeated: bool) -> None:
    assert repeats(text) is repeated


def heard(losses: list[float]) -> list[int]:
    """The steps at which an explosion is heard for the first time, or again after an end."""
    explosion, loud, steps = Explosion(), False, []
    for step, loss in enumerate(losses, 1):
        now = explosion.hears(loss)
        if now and not loud:
            steps.append(step)
        loud = loud if now is None else now
    return steps


def test_explosion_is_heard_once_and_noise_never() -> None:
    draw = random.Random(1)
    falling = [4 * 0.98**step + 0.3 * draw.random() for step in range(300)]
    assert heard(falling) == []
    assert heard([*falling[:200], 50.0, 60.0, 50.0, *falling[200:]]) == []
    assert heard([*falling[:200], *[3.5] * 50]) == [205]
    assert heard([*falling[:200], *[3.5] * 50, *falling[200:], *[3.5] * 9]) == [205, 355]
    assert heard([5.6, *[800.0 * draw.random() + 100 for _ in range(30)]]) == [6]
    unequal = [draw.choice([0.1, 0.4, 3.0, 4.5]) for _ in range(20_000)]  # one sample a step, of four kinds
    assert heard(unequal) == []


def test_the_memory_of_losses_is_bounded() -> None:
    explosion = Explosion()
    for _ in range(100):
        explosion.hears(1.0)
    assert len(explosion.last) == CALM_STEPS + 5 and explosion.calm == 1.0


def test_interval_is_that_of_students_t() -> None:
    torch.manual_seed(0)
    values = torch.randn(8, dtype=torch.float64)
    low, high = interval(values)
    exact = 2.3646 * float(values.std()) / 8**0.5  # quantile of 7 degrees of freedom from a table
    assert (high - low) / 2 == pytest.approx(exact, rel=0.005)
    assert (high + low) / 2 == pytest.approx(float(values.mean()))


@pytest.mark.parametrize(
    ("setting", "words"), [("sight_every=-1", "it must be at least 0"), ("sight_limit=7", "it must be at least 8")]
)
def test_settings(setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{setting.split('=')[0]} is -?\d; {words}"):
        compose_settings(["recipe=smoke", f"trainer.{setting}"])
