"""Typed settings. An unknown key, a wrong type or an argument that a part does not take is an error before any weight
loads."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eyespot.registry import (
    AUGMENTATIONS,
    BENCHMARKS,
    CONNECTORS,
    FILTERS,
    FORMATS,
    LANGUAGES,
    VISION,
    Registry,
    closest,
)

Mode = Literal["frozen", "full", "lora"]
MAX_FREQUENCIES = 16  # of positions; the last wave is finer than any pixel


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
    """name: a registered vision encoder; args: its arguments; layer, keep_cls: see VLMConfig; positions: frequencies
    of the patches' places that the connector is told beside their features (VLMConfig.vision_positions), for encoders
    whose features do not say, such as convolutions; resize: how a picture becomes a square for our own encoders."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    train: Mode = "frozen"
    lora: LoraSettings | None = None
    layer: int | None = None
    keep_cls: bool = False
    positions: int = 0
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
    training texts) or a folder, for models without one; quantize: frozen weights in four bits (QLoRA), on CUDA."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    train: Mode = "frozen"
    lora: LoraSettings | None = None
    quantize: Literal["nf4"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    template: str = "auto"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    add_bos: bool | None = None


@dataclass
class AlignmentSettings:
    """The head that compares pictures with texts. dim: width of the shared space; max_text: tokens at which a text is
    cut; tokenizer: of a connector with a text side (a Q-Former), "bpe:SIZE" (learned from the training texts), "byte",
    or a name or folder such as that of a BERT; without one the language model reads the texts."""

    dim: int = 256
    max_text: int = 32
    tokenizer: str | None = None


@dataclass
class ModelSettings:
    """The three parts, where pictures stand in the text, and whether the tokens of a picture see each other
    ("bidirectional", see VLMConfig) or only those before them; alignment: a fourth part that stages train; detection: a
    fifth one, set by itself for runs with a stage of kind detect."""

    vision: VisionSettings
    connector: ConnectorSettings
    language: LanguageSettings
    image_mode: Literal["placeholder", "prefix"] = "placeholder"
    image_attention: Literal["causal", "bidirectional"] = "causal"
    alignment: AlignmentSettings | None = None
    detection: bool = False


@dataclass
class DataSettings:
    """train, validation and test: ``{"format": registered name, **arguments}``; train may be a mixture, ``{name of a
    source: {"format": ..., "weight": share of the visits, "limit": at most so many samples, **arguments}}``; without
    weights every sample comes once an epoch; filters: ``{registered name: arguments}``, what is left out before the
    split; augment: ``{registered name: arguments}``, how training pictures and their words differ from visit to visit;
    validation_share: split off by picture, where there is no validation data; streaming: samples are read once and
    stay on the disk, not in memory; limit: at most so many training samples; max_length: tokens at which a sample is
    cut; packing: several samples in one row of at most row_length tokens; share: so many samples about the same picture
    stand behind one image prefix; cache_features: a frozen encoder sees each picture once and its features are kept on
    disk, as long as those of all encoders need at most cache_gb."""

    train: dict[str, Any]
    validation: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    filters: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    validation_share: float = 0.02
    streaming: bool = False
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
    alignment: float = 1e-3
    detection: float = 2e-3


@dataclass
class TrainerSettings:
    """How the parameters move. One step reads ``batch_size * accumulate`` samples on each device (on average, when
    samples about one picture stand together). devices: on each of num_nodes machines; strategy: ddp keeps the whole
    model on every device, fsdp spreads weights, gradients and optimizer over them, auto takes ddp for more than one;
    timeout_s: a process that waits longer for another one gives up. compile: torch.compile the layers, which pays in
    long runs on GPUs.
    num_workers: processes that read and resize pictures; by default none beside a CPU, which is busy itself.
    sight_every: so often, and after the last step, answers to up to sight_limit held-out pictures are scored beside
    their own picture, another one and none; 0 never does."""

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
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    timeout_s: float = 1800.0
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
    sight_every: int = 250
    sight_limit: int = 64


@dataclass
class LoggerSettings:
    """Where a run is recorded, one switch each; see eyespot.training.tracking. model: MLflow and Weights & Biases get
    the model folder, too; project: theirs; mlflow_uri: a server, or sqlite:///FILE; by default MLFLOW_TRACKING_URI, or
    mlflow.db in the output folder; wandb_offline: files for ``wandb sync``."""

    csv: bool = True
    tensorboard: bool = True
    mlflow: bool = False
    wandb: bool = False
    model: bool = False
    project: str = "eyespot"
    mlflow_uri: str | None = None
    wandb_offline: bool = False


@dataclass
class EvaluationSettings:
    """The evaluation at the end of a run, on ``data.test``, which names a format or a benchmark.

    max_new_tokens: the benchmark's own unless given; controls: blind, shuffled, majority, always; before: so many
    questions are also answered by the untrained model, for the report; pictures: so many are drawn with their answers
    before and after training, beside loss and patch features (0 draws nothing); relevance: for so many shown questions
    the report says which places of the picture the answer depended on.
    """

    run: bool = True
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int | None = None
    controls: list[str] = field(default_factory=lambda: ["blind", "shuffled", "majority", "always"])
    before: int = 12
    pictures: int = 8
    relevance: int = 4


@dataclass
class StageModes:
    """What a stage trains: "full" the weights of a part, "lora" its adapters; a part that is not named is frozen."""

    vision: Mode = "frozen"
    connector: Literal["frozen", "full"] = "frozen"
    language: Mode = "frozen"
    alignment: Literal["frozen", "full"] = "frozen"
    detection: Literal["frozen", "full"] = "frozen"


@dataclass
class StageLosses:
    """Weights of the losses; 0 leaves a loss out. contrastive: CLIP's softmax; sigmoid: SigLIP's; matching: does this
    text belong to this picture, with hard negatives; caption: the next word; names, words, boxes,
    counts: of what is in a picture."""

    contrastive: float = 0.0
    sigmoid: float = 0.0
    matching: float = 0.0
    caption: float = 0.0
    names: float = 0.0
    words: float = 0.0
    boxes: float = 0.0
    counts: float = 0.0


StageKind = Literal["contrastive", "matching", "joint", "detect", "caption", "align", "instruct", "preference"]
PAIR_KINDS = ("contrastive", "matching", "joint")  # compare pictures with texts
KIND_LOSSES = {  # of the kinds in which the language model is not asked for its own
    "contrastive": ("contrastive", "sigmoid"),
    "matching": ("matching",),
    "joint": ("contrastive", "matching", "caption", "sigmoid"),
    "detect": ("names", "words", "boxes", "counts"),
}
DEFAULT_LOSSES = {
    "contrastive": ("contrastive",),
    "matching": ("matching",),
    "joint": ("contrastive", "matching", "caption"),
    "detect": ("names", "words", "boxes", "counts"),
}
# what must be the same in all stages, which share their processes and their untrained weights
RUN_WIDE = ("seed", "device", "devices", "num_nodes", "strategy", "timeout_s")


@dataclass
class StageSettings:
    """One of several trainings that follow each other, each from the weights that the one before left.

    kind: "contrastive", "matching" and "joint" (both, and captioning) compare pictures with texts and need
    ``model.alignment``; "detect" teaches image tokens what is where; "caption", "align" (the connector only) and
    "instruct" let the language model speak; "preference" is DPO. train: see StageModes. losses: contrastive or matching
    alone, those of joint, or those of detect, unless given.
    data, trainer: what differs from the run's own; for "preference" see PreferenceData and PreferenceTrainer.
    """

    name: str
    kind: StageKind
    train: StageModes
    losses: StageLosses | None = None
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class PreferenceData:
    """See eyespot.training.preference.read_preferences."""

    path: str
    image_folder: str | None = None


@dataclass
class PreferenceTrainer:
    """See eyespot.training.preference.run_preference."""

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 5e-6
    beta: float = 0.1
    max_length: int | None = 1024


@dataclass
class TrainSettings:
    """One run, of one training or of several stages; in stages, they say what is trained, not the parts' ``train``."""

    name: str
    model: ModelSettings
    data: DataSettings
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    output_dir: str = "runs"
    stages: list[StageSettings] | None = None


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
    registry: Registry,
    name: str,
    arguments: Mapping[str, Any],
    where: str,
    given: tuple[str, ...] = (),
    inner: str = ".args",
) -> None:
    """Compare arguments with the signature of a registered part.

    Args:
        given: parameters that eyespot fills in itself.
        inner: where the arguments stand below ``where``, for messages.

    Raises:
        ConfigError: an argument that the part does not take, of the wrong type, or missing.
    """
    try:
        factory = registry[name]
    except ValueError as error:
        raise ConfigError(f"{where}.name: {error}") from error
    target: Callable[..., Any] = factory.__init__ if inspect.isclass(factory) else factory
    hints = typing.get_type_hints(target)
    parameters = {key: p for key, p in inspect.signature(factory).parameters.items() if key not in given}
    for key, value in arguments.items():
        if key not in parameters:
            names = list(parameters)
            raise ConfigError(
                f"{registry.kind} {name!r} takes no argument {key!r}{closest(key, names)} "
                f"(arguments: {', '.join(names)})"
            )
        check_value(value, hints.get(key, Any), f"{where}{inner}.{key}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise ConfigError(f"{where}{inner}.{key} is missing; {registry.kind} {name!r} needs it")


def check_vision(name: str, arguments: Mapping[str, Any], where: str, inner: str = ".args") -> None:
    """The encoder exists and takes its arguments, and so do the two inside a fusion."""
    check_arguments(VISION, name, arguments, where, ("dtype",), inner)
    for place in ("first", "second") if name == "fusion" else ():
        part = dict(arguments[place])
        if "name" not in part:
            raise ConfigError(f"{where}{inner}.{place}.name is missing; choices: {', '.join(VISION.names())}")
        check_vision(part.pop("name"), part, f"{where}{inner}.{place}", "")


def check_model(settings: ModelSettings) -> None:
    """Every part exists and takes its arguments; a part trained with LoRA has LoRA settings, and only such a part."""
    check_vision(settings.vision.name, settings.vision.args, "model.vision")
    check_arguments(
        CONNECTORS, settings.connector.name, settings.connector.args, "model.connector", ("vision_dim", "language_dim")
    )
    check_arguments(
        LANGUAGES, settings.language.name, settings.language.args, "model.language", ("dtype", "vocab_size", "quantize")
    )
    if settings.language.quantize is not None:
        _check_quantize(settings.language)
    if not 0 <= settings.vision.positions <= MAX_FREQUENCIES:
        raise ConfigError(
            f"model.vision.positions is {settings.vision.positions}; give 0 for none, up to {MAX_FREQUENCIES}"
        )
    if settings.vision.positions and settings.vision.keep_cls:
        raise ConfigError(
            "model.vision.positions is set, but the CLS token has no place; set model.vision.keep_cls=false"
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
    if settings.alignment is not None:
        check_alignment(settings.alignment, settings.connector)


def check_alignment(alignment: AlignmentSettings, connector: ConnectorSettings) -> None:
    """Sizes are possible, and a tokenizer has a connector that reads what it writes."""
    for key, least in (("dim", 1), ("max_text", 3)):
        if getattr(alignment, key) < least:
            raise ConfigError(f"model.alignment.{key} is {getattr(alignment, key)}; it must be at least {least}")
    factory: Any = CONNECTORS[connector.name]
    takes_text = "text_vocab_size" in inspect.signature(factory).parameters
    if alignment.tokenizer is not None and not takes_text:
        raise ConfigError(
            f"model.alignment.tokenizer is {alignment.tokenizer!r} but connector {connector.name!r} reads no texts; "
            "drop it, and the language model will, or use connector qformer"
        )
    for key in ("text_vocab_size", "max_text"):
        if key in connector.args:
            raise ConfigError(f"model.connector.args.{key} comes from model.alignment; drop it, or drop the alignment")


def _check_quantize(language: LanguageSettings) -> None:
    if language.name != "pretrained":
        raise ConfigError(
            f"model.language.quantize is {language.quantize} but model.language.name is {language.name!r}; only "
            "pretrained models are loaded in four bits"
        )
    if language.train == "full" or language.dtype == "float32":
        key = "train" if language.train == "full" else "dtype"
        raise ConfigError(
            f"model.language.quantize is {language.quantize} but model.language.{key} is {getattr(language, key)}; "
            "weights in four bits cannot learn and are unpacked to bfloat16, so set train=lora and dtype=auto"
        )


def sources_of(train: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The sources of ``data.train`` by their names: those of a mixture, or the only one, which is called ""."""
    is_mixture = bool(train) and all(isinstance(source, Mapping) for source in train.values())
    return dict(train) if is_mixture else {"": train}


def check_source(source: Mapping[str, Any], where: str, given: tuple[str, ...] = ()) -> None:
    """The format, or for ``data.test`` the benchmark, exists and takes its arguments; keys in ``given`` are not its."""
    if where == "data.test" and "benchmark" in source:
        arguments = {key: value for key, value in source.items() if key != "benchmark"}
        check_arguments(BENCHMARKS, source["benchmark"], arguments, where, inner="")
        return
    if "format" not in source:
        raise ConfigError(f"{where}.format is missing; choices: {', '.join(FORMATS.names())}")
    arguments = {key: value for key, value in source.items() if key not in ("format", *given)}
    check_arguments(FORMATS, source["format"], arguments, where, inner="")


def check_mixture(train: Mapping[str, Any]) -> None:
    """Every source can be read; weights are above 0, and all sources have one or none has."""
    if "" in (sources := sources_of(train)):
        check_source(train, "data.train")
        return
    for name, source in sources.items():
        where = f"data.train.{name}"
        check_source(source, where, ("weight", "limit"))
        for key, hint in (("weight", float), ("limit", int)):
            if key in source and check_value(source[key], hint, f"{where}.{key}") <= 0:
                raise ConfigError(f"{where}.{key} is {source[key]}; it must be above 0")
    without = [name for name, source in sources.items() if "weight" not in source]
    if 0 < len(without) < len(sources):
        raise ConfigError(f"data.train.{without[0]}.weight is missing, others have one; give all sources one, or none")


def build_parts(registry: Registry, parts: Mapping[str, Any], where: str) -> list[Any]:
    """Registered parts from ``{name: arguments}``, in that order.

    Raises:
        ConfigError: an unknown name or argument, or a value that the part refuses.
    """
    built = []
    for name, arguments in parts.items():
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"{where}.{name} is {arguments!r}; give its arguments, or {{}} for the defaults")
        check_arguments(registry, name, arguments, f"{where}.{name}", inner="")
        try:
            built.append(registry[name](**arguments))
        except ValueError as error:
            raise ConfigError(f"{where}.{name}: {error}") from error
    return built


def stage_settings(settings: TrainSettings, number: int) -> TrainSettings:
    """A stage as a run of its own, in the folder stages/NUMBER-NAME of the whole; its model is that of all stages.

    Raises:
        ConfigError: what the stage wants to differ is no setting of data or trainer.
    """
    stage = (settings.stages or [])[number]
    data, trainer = dict(to_dict(settings.data)), dict(to_dict(settings.trainer))
    changed = dict(stage.trainer)
    if isinstance(rates := changed.get("lr"), Mapping):
        changed["lr"] = {**trainer["lr"], **rates}
    return dataclasses.replace(
        settings,
        name=f"{settings.name}/stages/{number}-{stage.name}",
        model=stages_model(settings),
        data=from_dict(DataSettings, {**data, **stage.data}, "data"),
        trainer=from_dict(TrainerSettings, {**trainer, **changed}, "trainer"),
        stages=None,
    )


def stages_model(settings: TrainSettings) -> ModelSettings:
    """The model of a run as all its stages need it: adapters if one of them trains adapters, float32 where one trains
    the weights themselves."""
    model = settings.model
    for name in ("vision", "language"):
        part = getattr(model, name)
        modes = {getattr(stage.train, name) for stage in settings.stages or []}
        part = dataclasses.replace(part, train="lora" if "lora" in modes else "full" if "full" in modes else "frozen")
        if "full" in modes and part.dtype == "auto":
            part.dtype = "float32"
        model = dataclasses.replace(model, **{name: part})
    learns = any(stage.train.connector == "full" for stage in settings.stages or [])
    return dataclasses.replace(
        model,
        connector=dataclasses.replace(model.connector, train="full" if learns else "frozen"),
        detection=any(stage.kind == "detect" for stage in settings.stages or []),
    )


def check_stages(settings: TrainSettings) -> None:
    """Every stage can be run, and there is a stage for everything that is set."""
    stages = settings.stages or []
    names = [stage.name for stage in stages]
    if not stages or len(set(names)) < len(names):
        raise ConfigError(f"stages are named {names}; give at least one, each with a name of its own")
    for number, stage in enumerate(stages):
        if not re.fullmatch(r"[\w-]+", stage.name):
            raise ConfigError(f"stages[{number}].name is {stage.name!r}; use letters, digits, - and _ only")
        try:
            check_stage(settings, number)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}") from error
    if settings.model.alignment is not None and not any(stage.kind in PAIR_KINDS for stage in stages):
        raise ConfigError(f"model.alignment is set but no stage trains it; add one of kind {', '.join(PAIR_KINDS)}")


def check_stage(settings: TrainSettings, number: int) -> None:
    """Raise ConfigError unless what a stage trains, its losses, data and trainer fit its kind and the model."""
    stages = settings.stages or []
    stage = stages[number]
    modes = to_dict(stage.train)
    if set(modes.values()) == {"frozen"}:
        raise ConfigError("every part is frozen; set train to {connector: full}, or another part to full or lora")
    for name in ("vision", "language"):
        if modes[name] == "full" and getattr(settings.model, name).dtype == "bfloat16":
            raise ConfigError(f"train.{name} is full but model.{name}.dtype is bfloat16; set it to float32 or auto")
    stage_losses(stage)
    if stage.kind == "preference":
        check_preference(settings, number)
        return
    for key in RUN_WIDE:
        if key in stage.trainer:
            raise ConfigError(f"trainer.{key} is the same in all stages; set it for the run")
    if stage.kind == "align" and modes != to_dict(StageModes(connector="full")):
        raise ConfigError(f"train is {modes}, but align trains the connector only; use kind instruct or caption")
    own = stage_settings(settings, number)
    if stage.kind in PAIR_KINDS:
        check_pair_stage(own, modes)
    elif modes["alignment"] != "frozen":
        raise ConfigError(f"train.alignment is full, but kind {stage.kind!r} compares no pairs; leave it frozen")
    if stage.kind == "detect":
        check_detect_stage(own, modes)
    elif modes["detection"] != "frozen":
        raise ConfigError(f"train.detection is full, but kind {stage.kind!r} looks for no objects; leave it frozen")
    check_run(own)


def stage_losses(stage: StageSettings) -> dict[str, float]:
    """The losses of a stage and their weights; none where the language model's own is meant.

    Raises:
        ConfigError: a weight below 0, or a loss that the kind cannot compute.
    """
    if stage.kind not in KIND_LOSSES:
        if stage.losses is not None:
            raise ConfigError(f"losses are set, but kind {stage.kind!r} has one loss and no pairs; leave them out")
        return {}
    takes = KIND_LOSSES[stage.kind]
    given = {} if stage.losses is None else {name: w for name, w in to_dict(stage.losses).items() if w != 0}
    for name, weight in given.items():
        if name not in takes:
            kinds = [kind for kind, losses in KIND_LOSSES.items() if name in losses]
            raise ConfigError(
                f"kind {stage.kind!r} cannot compute the loss {name!r}; it takes {', '.join(takes)} "
                f"({name} belongs to: {', '.join(kinds)})"
            )
        if weight < 0:
            raise ConfigError(f"losses.{name} is {weight}; a weight is 0 or above")
    if stage.losses is not None and not given:
        raise ConfigError(f"all losses are 0; give one of {', '.join(takes)} a weight")
    return given or dict.fromkeys(DEFAULT_LOSSES[stage.kind], 1.0)


def check_pair_stage(settings: TrainSettings, modes: Mapping[str, str]) -> None:
    """Raise ConfigError unless a stage that compares pictures with texts has a head to learn and pairs to compare."""
    trainer = settings.trainer
    if settings.model.alignment is None:
        raise ConfigError("model.alignment is missing; set it, for example to {dim: 256}, to compare pairs")
    if settings.model.alignment.tokenizer is not None and modes["language"] != "frozen":
        raise ConfigError(
            f"train.language is {modes['language']}, but the connector's text side reads the texts here and the "
            "language model learns nothing; leave it frozen"
        )
    if modes["alignment"] != "full":
        raise ConfigError("train.alignment is frozen, but it is what compares pairs; set it to full")
    if trainer.batch_size * trainer.devices * trainer.num_nodes < 2:
        raise ConfigError("trainer.batch_size is 1 on one device; pairs are compared with each other, use 2 or more")
    if trainer.accumulate > 1:
        raise ConfigError(
            f"trainer.accumulate is {trainer.accumulate}, but pairs of different micro-batches are never compared; use "
            "1 (more pairs fit with precision=bf16, a frozen vision encoder or more devices)"
        )
    if trainer.strategy == "fsdp":
        raise ConfigError("trainer.strategy is fsdp, but pairs are compared by whole models; use ddp")


def check_detect_stage(settings: TrainSettings, modes: Mapping[str, str]) -> None:
    """Raise ConfigError unless image tokens have places in the picture and only what makes them learns."""
    connector, trainer = settings.model.connector.name, settings.trainer
    if not getattr(CONNECTORS[connector], "keeps_grid", False):
        keep = [name for name in CONNECTORS.names() if getattr(CONNECTORS[name], "keeps_grid", False)]
        raise ConfigError(
            f"connector {connector!r} gives tokens that have no place in the picture, which kind detect needs; use "
            f"{' or '.join(keep)}"
        )
    if settings.model.vision.keep_cls:
        raise ConfigError("model.vision.keep_cls is true, but kind detect needs tokens with a place; set it to false")
    if modes["language"] != "frozen":
        raise ConfigError(
            f"train.language is {modes['language']}, but kind detect asks it for nothing; leave it frozen"
        )
    if modes["detection"] != "full":
        raise ConfigError("train.detection is frozen, but it is what finds objects; set it to full")
    if trainer.accumulate > 1:
        raise ConfigError(
            f"trainer.accumulate is {trainer.accumulate}, but names of different micro-batches are never compared; use "
            "1 (more pictures fit with precision=bf16, a frozen vision encoder or more devices)"
        )
    if trainer.strategy == "fsdp":
        raise ConfigError("trainer.strategy is fsdp, but objects are looked for by whole models; use ddp")


def check_preference(settings: TrainSettings, number: int) -> None:
    """Raise ConfigError unless a stage of kind preference comes last and has what run_preference takes."""
    stages = settings.stages or []
    stage = stages[number]
    if number == 0 or number < len(stages) - 1:
        raise ConfigError(f"it is number {number + 1} of {len(stages)}; kind preference is the last of several stages")
    has_adapters = any(other.train.language == "lora" for other in stages)
    wanted = StageModes(language="lora" if has_adapters else "full")
    if stage.train != wanted:
        raise ConfigError(f"train is {to_dict(stage.train)}; preferences train {{language: {wanted.language}}} here")
    if settings.trainer.devices * settings.trainer.num_nodes > 1:
        raise ConfigError(f"trainer.devices is {settings.trainer.devices}; kind preference runs on 1")
    from_dict(PreferenceData, stage.data, "data")
    from_dict(PreferenceTrainer, stage.trainer, "trainer")


def check_settings(settings: TrainSettings) -> None:
    """Everything that can be known to be wrong before weights or pictures are read."""
    if settings.stages is None:
        if settings.model.alignment is not None:
            raise ConfigError("model.alignment is set but there are no stages to train it; add stages or drop it")
        check_run(settings)
        return
    check_stages(settings)
    check_run(dataclasses.replace(settings, model=stages_model(settings)))


def check_run(settings: TrainSettings) -> None:
    """Raise ConfigError for what a single training cannot use; see ``check_settings``."""
    check_model(settings.model)
    check_mixture(settings.data.train)
    for split in ("validation", "test"):
        if (source := getattr(settings.data, split)) is not None:
            check_source(source, f"data.{split}")
    build_parts(FILTERS, settings.data.filters, "data.filters")
    build_parts(AUGMENTATIONS, settings.data.augment, "data.augment")
    trainer = settings.trainer
    for key in ("batch_size", "accumulate", "devices", "log_every", "validate_every", "checkpoint_every"):
        if getattr(trainer, key) < 1:
            raise ConfigError(f"trainer.{key} is {getattr(trainer, key)}; it must be at least 1")
    if not 0 <= settings.data.validation_share < 1:
        raise ConfigError(f"data.validation_share is {settings.data.validation_share}; it must be from 0 to below 1")
    if settings.data.cache_gb <= 0:
        raise ConfigError(f"data.cache_gb is {settings.data.cache_gb}; it must be above 0 (or cache_features=false)")
    for key, least in (("sight_every", 0), ("sight_limit", 8)):
        if getattr(trainer, key) < least:
            raise ConfigError(f"trainer.{key} is {getattr(trainer, key)}; it must be at least {least}")
    for key in ("before", "pictures", "relevance"):
        if getattr(settings.evaluation, key) < 0:
            raise ConfigError(f"evaluation.{key} is {getattr(settings.evaluation, key)}; it must be at least 0")
    if trainer.epochs <= 0:
        raise ConfigError(f"trainer.epochs is {trainer.epochs}; it must be above 0")
    modes = {settings.model.vision.train, settings.model.connector.train, settings.model.language.train}
    if modes == {"frozen"} and settings.model.alignment is None:
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
