"""Typed settings. An unknown key, a wrong type or an argument that a part does not take is an error before any weight
loads."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eyespot.registry import CONNECTORS, FORMATS, LANGUAGES, VISION, Registry, closest

Mode = Literal["frozen", "full", "lora"]


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is possible."""


@dataclass
class LoraSettings:
    """See eyespot.models.lora.add_lora."""

    r: int = 64
    alpha: float = 128
    dropout: float = 0.0
    targets: str | list[str] = "attention"
    bias: Literal["none", "all", "lora_only"] = "none"


@dataclass
class VisionSettings:
    """name: a registered vision encoder; args: its arguments; layer, keep_cls: see VLMConfig; resize: how a picture
    becomes a square for our own encoders."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    train: Mode = "frozen"
    lora: LoraSettings | None = None
    layer: int | None = None
    keep_cls: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    resize: Literal["squash", "crop", "pad"] = "squash"


@dataclass
class ConnectorSettings:
    """name: a registered connector; args: its arguments; calibrate: bring its output to the size of the text
    embeddings before the first step, which a pretrained language model needs and an untrained one does not."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    train: Literal["frozen", "full"] = "full"
    calibrate: bool = True


@dataclass
class LanguageSettings:
    """name: a registered language model; args: its arguments; template: "auto" (the tokenizer's own if it has one,
    else plain), "plain", "raw" or a Jinja template; tokenizer: "byte", "char:LETTERS", "bpe:SIZE" (learned from the
    training texts) or a folder, for models without one."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    train: Mode = "frozen"
    lora: LoraSettings | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    template: str = "auto"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    add_bos: bool | None = None


@dataclass
class ModelSettings:
    """The three parts, and where pictures stand in the text."""

    vision: VisionSettings
    connector: ConnectorSettings
    language: LanguageSettings
    image_mode: Literal["placeholder", "prefix"] = "placeholder"


@dataclass
class DataSettings:
    """train and test: ``{"format": registered name, **arguments}``; validation_share: split off by picture;
    limit: at most so many training samples; max_length: tokens at which a sample is cut; packing: several samples in
    one row of at most row_length tokens; share: so many samples about the same picture stand behind one image
    prefix; cache_features: a frozen encoder sees each picture once and its features are kept on disk, as long as those
    of all encoders need at most cache_gb."""

    train: dict[str, Any]
    test: dict[str, Any] | None = None
    validation_share: float = 0.02
    limit: int | None = None
    max_length: int | None = None
    packing: bool = True
    row_length: int = 512
    share: int = 8
    cache_features: bool = True
    cache_gb: float = 20.0


@dataclass
class LearningRates:
    """AdamW's peak learning rate of each part."""

    vision: float = 1e-5
    connector: float = 1e-3
    language: float = 2e-4


@dataclass
class TrainerSettings:
    """How the parameters move. One step reads ``batch_size * accumulate`` samples on each device (on average, when
    samples about one picture stand together). compile: torch.compile the layers, which pays in long runs on GPUs.
    num_workers: processes that read and resize pictures; by default none beside a CPU, which is busy itself."""

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    lr: LearningRates = field(default_factory=LearningRates)
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    warmup_share: float = 0.03
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    num_workers: int | None = None
    seed: int = 42
    log_every: int = 10
    validate_every: int = 500
    validation_limit: int = 512
    checkpoint_every: int = 500
    keep_best: int = 2
    patience: int | None = None
    samples_every: int = 250
    num_samples: int = 4


@dataclass
class LoggerSettings:
    """Where curves go, one switch each."""

    csv: bool = True
    tensorboard: bool = True


@dataclass
class EvaluationSettings:
    """The evaluation at the end of a run, on ``data.test``. controls: blind, shuffled, majority; before: so many
    questions are also answered by the untrained model, for the report."""

    run: bool = True
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int = 16
    controls: list[str] = field(default_factory=lambda: ["blind", "shuffled", "majority"])
    before: int = 12


@dataclass
class TrainSettings:
    """One run."""

    name: str
    model: ModelSettings
    data: DataSettings
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    output_dir: str = "runs"


def from_dict(cls: type[Any], values: Mapping[str, Any], where: str = "") -> Any:
    """A settings dataclass from plain values, checked key by key.

    Raises:
        ConfigError: unknown or missing key, or a value of another type; the message gives the full path of the key.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} is {values!r}; it needs keys: {', '.join(_names(cls))}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(
                f"unknown key {_join(where, key)!r}{closest(str(key), _names(cls))} (keys: {', '.join(_names(cls))})"
            )
    missing = [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in values]
    if missing:
        raise ConfigError(f"{_join(where, missing[0])!r} is missing; every {where or 'run'} needs it")
    return cls(**{key: check_value(value, hints[key], _join(where, key)) for key, value in values.items()})


def check_value(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotation wants it (an int passes for a float, nothing else is converted), or ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _check_union(value, arguments, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) != any(
            value is a for a in arguments if isinstance(a, bool)
        ):
            raise ConfigError(f"{where} is {value!r}; choose one of: {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, where)
    if origin in (list, Sequence) and isinstance(value, (list, tuple)):
        return [check_value(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); it needs {wanted}")


def _check_union(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return check_value(value, choice, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[-1] if len(errors) == 1 else ConfigError(f"{where} is {value!r}; it needs one of: {choices}")


def check_arguments(
    registry: Registry, name: str, arguments: Mapping[str, Any], where: str, given: tuple[str, ...] = ()
) -> None:
    """Compare arguments with the signature of a registered part.

    Args:
        given: parameters that eyespot fills in itself.

    Raises:
        ConfigError: an argument that the part does not take, of the wrong type, or missing.
    """
    try:
        factory = registry[name]
    except ValueError as error:
        raise ConfigError(f"{where}.name: {error}") from error
    target: Callable[..., Any] = factory.__init__ if inspect.isclass(factory) else factory
    hints = typing.get_type_hints(target)
    parameters = {key: p for key, p in inspect.signature(target).parameters.items() if key not in ("self", *given)}
    for key, value in arguments.items():
        if key not in parameters:
            names = list(parameters)
            raise ConfigError(
                f"{registry.kind} {name!r} takes no argument {key!r}{closest(key, names)} "
                f"(arguments: {', '.join(names)})"
            )
        check_value(value, hints.get(key, Any), f"{where}.args.{key}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise ConfigError(f"{where}.args.{key} is missing; {registry.kind} {name!r} needs it")


def check_model(settings: ModelSettings) -> None:
    """Every part exists and takes its arguments; a part trained with LoRA has LoRA settings, and only such a part."""
    check_arguments(VISION, settings.vision.name, settings.vision.args, "model.vision", ("dtype",))
    check_arguments(
        CONNECTORS, settings.connector.name, settings.connector.args, "model.connector", ("vision_dim", "language_dim")
    )
    check_arguments(
        LANGUAGES, settings.language.name, settings.language.args, "model.language", ("dtype", "vocab_size")
    )
    for name, part in (("vision", settings.vision), ("language", settings.language)):
        if part.train == "full" and part.dtype == "bfloat16":
            raise ConfigError(
                f"model.{name}.dtype is bfloat16 but model.{name}.train is full; AdamW rounds small steps to zero in "
                f"bfloat16, so set model.{name}.dtype=float32 (trainer.precision=bf16 still computes in bfloat16)"
            )
        if part.train == "lora" and part.lora is None:
            part.lora = LoraSettings()
        if part.train != "lora" and part.lora is not None:
            raise ConfigError(
                f"model.{name}.lora is set but model.{name}.train is {part.train!r}; set it to lora or drop lora"
            )


def check_settings(settings: TrainSettings) -> None:
    """Everything that can be known to be wrong before weights or pictures are read."""
    check_model(settings.model)
    for split in ("train", "test"):
        source = getattr(settings.data, split)
        if source is not None:
            arguments = {key: value for key, value in source.items() if key != "format"}
            if "format" not in source:
                raise ConfigError(f"data.{split}.format is missing; choices: {', '.join(FORMATS.names())}")
            check_arguments(FORMATS, source["format"], arguments, f"data.{split}")
    trainer = settings.trainer
    for key in ("batch_size", "accumulate", "devices", "log_every", "validate_every", "checkpoint_every"):
        if getattr(trainer, key) < 1:
            raise ConfigError(f"trainer.{key} is {getattr(trainer, key)}; it must be at least 1")
    if not 0 <= settings.data.validation_share < 1:
        raise ConfigError(f"data.validation_share is {settings.data.validation_share}; it must be from 0 to below 1")
    if settings.data.cache_gb <= 0:
        raise ConfigError(f"data.cache_gb is {settings.data.cache_gb}; it must be above 0 (or cache_features=false)")
    if trainer.epochs <= 0:
        raise ConfigError(f"trainer.epochs is {trainer.epochs}; it must be above 0")
    modes = {settings.model.vision.train, settings.model.connector.train, settings.model.language.train}
    if modes == {"frozen"}:
        raise ConfigError("every part is frozen; set model.connector.train=full, or another part to full or lora")


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain values of a settings dataclass, for JSON and YAML."""
    return dataclasses.asdict(settings)


def _names(cls: type[Any]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
