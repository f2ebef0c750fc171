"""Settings: every key known, every value of its type, every argument one that the part takes; else an early error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from eyespot.config import (
    ConfigError,
    LoraSettings,
    ModelSettings,
    TrainerSettings,
    TrainSettings,
    check_arguments,
    check_model,
    check_settings,
    check_value,
    from_dict,
    to_dict,
)
from eyespot.registry import CONNECTORS, LANGUAGES, VISION, Registry

MODEL: dict[str, Any] = {
    "vision": {"name": "vit", "args": {"image_size": 32}},
    "connector": {"name": "mlp"},
    "language": {"name": "gpt"},
}
RUN: dict[str, Any] = {"name": "test", "model": MODEL, "data": {"train": {"format": "easy_vqa"}}}


def put(values: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one key changed: put(RUN, "model.vision.name", "vit")."""
    key, _, rest = path.partition(".")
    return {**values, key: put(values.get(key) or {}, rest, value) if rest else value}


def run(path: str = "name", value: Any = "test") -> TrainSettings:
    settings: TrainSettings = from_dict(TrainSettings, put(RUN, path, value))
    return settings


def test_defaults_and_round_trip() -> None:
    settings = run()
    assert settings.trainer == TrainerSettings() and settings.model.vision.train == "frozen"
    assert from_dict(TrainSettings, to_dict(settings)) == settings
    check_settings(settings)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("trainer.batchsize", "unknown key 'trainer.batchsize'; did you mean 'batch_size'?"),
        ("model.vision.arg", "unknown key 'model.vision.arg'; did you mean 'args'?"),
        ("trainer.lr.visoin", "unknown key 'trainer.lr.visoin'; did you mean 'vision'? (keys: vision, connector, lang"),
        ("trainer.qqqqqq", "unknown key 'trainer.qqqqqq' (keys: "),
        ("optimizer", "unknown key 'optimizer'"),
    ],
)
def test_unknown_keys(path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        run(path, 1)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("trainer.batch_size", "32", "trainer.batch_size is '32' (str); it needs int"),
        ("trainer.batch_size", True, "trainer.batch_size is True (bool); it needs int"),
        ("trainer.batch_size", 2.0, "trainer.batch_size is 2.0 (float); it needs int"),
        ("trainer.lr.vision", "1e-3", "trainer.lr.vision is '1e-3' (str); it needs float"),
        ("trainer.lr.vision", True, "trainer.lr.vision is True (bool); it needs float"),
        ("trainer.lr.vision", None, "trainer.lr.vision is None (NoneType); it needs float"),
        ("trainer.gradient_checkpointing", "false", "is 'false' (str); it needs bool"),
        ("trainer.gradient_checkpointing", 1, "is 1 (int); it needs bool"),
        ("trainer.betas", [0.9, "x"], "trainer.betas[1] is 'x' (str); it needs float"),
        ("trainer.betas", 0.9, "trainer.betas is 0.9 (float)"),
        ("trainer.decay", "linaer", "trainer.decay is 'linaer'; choose one of: linear, cosine, constant"),
        ("trainer.decay", True, "trainer.decay is True; choose one of"),
        ("trainer.max_steps", "ten", "trainer.max_steps is 'ten' (str); it needs int"),
        ("trainer", 3, "trainer is 3; it needs keys: "),
        ("model.vision.args", [1], "model.vision.args is [1] (list)"),
        ("model.vision.lora", {"rank": 4}, "unknown key 'model.vision.lora.rank'"),
        ("name", 5, "name is 5 (int); it needs str"),
    ],
)
def test_wrong_types(path: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        run(path, value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["name", "model", "model.vision", "model.vision.name", "data.train"])
def test_missing_keys(path: str) -> None:
    values = put(RUN, path, None)
    parent = values
    for key in path.split(".")[:-1]:
        parent = parent[key]
    del parent[path.split(".")[-1]]
    with pytest.raises(ConfigError, match=rf"'{path}' is missing"):
        from_dict(TrainSettings, values)


def test_an_int_is_a_float_and_none_is_allowed_where_it_says_so() -> None:
    value = run("trainer.lr.vision", 1).trainer.lr.vision
    assert value == 1.0 and isinstance(value, float)
    assert run("trainer.max_steps", None).trainer.max_steps is None
    assert run("trainer.betas", (0.5, 1)).trainer.betas == [0.5, 1.0]


@dataclass
class Odd:
    both: str | list[int] = "a"
    number: Literal[1, 2] = 1
    nested: LoraSettings | None = None
    free: dict[str, Any] = field(default_factory=dict)
    anything: Any = None


def test_unions_literals_and_nested_settings() -> None:
    assert from_dict(Odd, {"both": [1, 2]}).both == [1, 2]
    assert from_dict(Odd, {"both": "x"}).both == "x"
    with pytest.raises(ConfigError, match=r"both is 1\.5; it needs one of"):
        from_dict(Odd, {"both": 1.5})
    with pytest.raises(ConfigError, match="number is True; choose one of: 1, 2"):
        from_dict(Odd, {"number": True})
    assert from_dict(Odd, {"nested": {"r": 3}}).nested == LoraSettings(r=3)
    assert from_dict(Odd, {"nested": None}).nested is None
    with pytest.raises(ConfigError, match=r"nested\.r is 'x'"):
        from_dict(Odd, {"nested": {"r": "x"}})
    given = {"a": [1]}
    assert from_dict(Odd, {"free": given, "anything": given}).free == given


def test_settings_do_not_share_what_was_given() -> None:
    given = {"a": 1}
    settings = from_dict(Odd, {"free": given})
    settings.free["b"] = 2
    assert given == {"a": 1} and from_dict(Odd, {}).free == {}


# --- arguments of parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registry", "name", "arguments", "words"),
    [
        (
            VISION,
            "vit",
            {"image_sze": 3},
            "vision encoder 'vit' takes no argument 'image_sze'; did you mean 'image_size'?",
        ),
        (VISION, "vit", {"image_size": "3"}, "m.args.image_size is '3' (str); it needs int"),
        (VISION, "vit", {"use_cls_token": 1}, "m.args.use_cls_token is 1 (int); it needs bool"),
        (VISION, "vit", {"image_mean": 0.5}, "m.args.image_mean is 0.5"),
        (VISION, "convnet", {"depths": [1, "x"]}, "m.args.depths[1] is 'x'"),
        (VISION, "pretrained", {}, "m.args.source is missing; vision encoder 'pretrained' needs it"),
        (CONNECTORS, "mlp", {"self": 1}, "connector 'mlp' takes no argument 'self'"),
        (CONNECTORS, "mlp", {"vision_dim": 3}, "connector 'mlp' takes no argument 'vision_dim'"),
        (CONNECTORS, "mpl", {}, "m.name: unknown connector 'mpl'; did you mean 'mlp'?"),
        (LANGUAGES, "gpt", {"layers": 3}, "language model 'gpt' takes no argument 'layers'"),
    ],
)
def test_arguments_are_those_of_the_part(registry: Registry, name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_arguments(registry, name, arguments, "m", ("vision_dim", "language_dim"))


def test_sequences_may_be_lists() -> None:
    check_arguments(VISION, "convnet", {"depths": [1, 2], "image_mean": (0.1, 0.2, 0.3)}, "m")
    with pytest.raises(ConfigError, match="x is 'ab'"):
        check_value("ab", check_arguments.__annotations__ and list[str], "x")


def model(path: str, value: Any) -> ModelSettings:
    settings: ModelSettings = from_dict(ModelSettings, put(MODEL, path, value), "model")
    return settings


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("vision", {"name": "vit", "train": "full", "dtype": "bfloat16"}, "set model.vision.dtype=float32"),
        (
            "language",
            {"name": "gpt", "lora": {"r": 2}},
            "model.language.lora is set but model.language.train is 'frozen'",
        ),
        ("connector", {"name": "mlp", "args": {"depht": 2}}, "takes no argument 'depht'; did you mean 'depth'?"),
        ("language", {"name": "gpt", "args": {"vocab_size": 5}}, "takes no argument 'vocab_size'"),
    ],
)
def test_models_that_cannot_be(path: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_model(model(path, value))


def test_lora_has_defaults() -> None:
    settings = model("language", {"name": "gpt", "train": "lora"})
    check_model(settings)
    assert settings.language.lora == LoraSettings()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("trainer.batch_size", 0, "trainer.batch_size is 0; it must be at least 1"),
        ("trainer.accumulate", -1, "trainer.accumulate is -1; it must be at least 1"),
        ("trainer.epochs", 0, "trainer.epochs is 0.0; it must be above 0"),
        ("data.validation_share", 1.0, "data.validation_share is 1.0; it must be from 0 to below 1"),
        ("data.train", {"split": "train"}, "data.train.format is missing; choices: "),
        ("data.train.format", "easy_vqq", "unknown data format 'easy_vqq'; did you mean 'easy_vqa'?"),
        ("model.connector.train", "frozen", "every part is frozen"),
    ],
)
def test_runs_that_cannot_be(path: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_settings(run(path, value))
