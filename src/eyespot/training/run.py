"""A run from its settings to a trained folder: the composition root of training."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from eyespot.compose import build_from_settings, load_checkpoint, load_trained, save, with_dtypes
from eyespot.config import (
    PAIR_KINDS,
    ConfigError,
    DataSettings,
    ModelSettings,
    TrainerSettings,
    TrainSettings,
    build_parts,
    check_settings,
    check_value,
    from_dict,
    sources_of,
    stages_model,
    to_dict,
)
from eyespot.data import mixture, sources
from eyespot.data.sample import ImageSource, LoadReport, Sample
from eyespot.devices import choose_device, has_fast_bfloat16
from eyespot.files import default_cache, make_folder, one_at_a_time
from eyespot.inference import Assistant, load
from eyespot.models.compiling import compile_layers
from eyespot.models.parameters import parameter_table
from eyespot.processing.tokenizers import bpe_tokenizer
from eyespot.registry import AUGMENTATIONS, FILTERS, closest
from eyespot.training.origin import origin
from eyespot.training.tracking import IDS_FILE, check_trackers, loggers, open_trackers

if TYPE_CHECKING:
    from eyespot.data.augmenter import Augmenter
    from eyespot.data.collate import Collator
    from eyespot.data.datamodule import VLMDataModule
    from eyespot.data.features import FeatureStore
    from eyespot.training.callbacks import Reporter
    from eyespot.training.checkpoint import CheckpointWriter
    from eyespot.training.module import VLMModule
    from eyespot.training.stages import Measure, Stage
    from eyespot.training.watch import Lookout

BeforeTraining = Callable[[Assistant], None]
RECORD_FILE = "training.json"
SETTINGS_FILE = "settings.json"
CALIBRATION_SAMPLES = 32
PLACEMENT = ("batch_size", "accumulate", "devices", "num_nodes")
WAITING = ("num_workers", "timeout_s")


@dataclass
class Run:
    """What a run left behind; samples and seconds are those of training alone.

    finished is False when the run was stopped; the same command goes on from its checkpoint. looks and warnings are
    those of eyespot.training.watch.Lookout.
    """

    folder: Path
    settings: TrainSettings
    finished: bool
    steps: int
    samples: int
    seconds: float
    curve: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    stopped_by: str | None = None
    assistant: Assistant | None = field(default=None, repr=False)
    looks: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"


def compose_settings(overrides: Sequence[str]) -> TrainSettings:
    """Settings from command-line overrides: ``["recipe=quickstart", "trainer.batch_size=16", "vision=vit_tiny"]``.

    ``+shrink=true`` makes the recipe small before values are overridden (see eyespot.training.shrink).

    Raises:
        ConfigError: unknown recipe, group, key or value.
    """
    import yaml
    from hydra import compose, initialize_config_module
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not any(o.lstrip("+").startswith("recipe=") for o in overrides):
        raise ConfigError("no recipe was given; add recipe=NAME with one of: " + ", ".join(choices("recipe")))
    groups, values, shrinks = [], [], False
    for override in overrides:
        key, equals, name = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no value; write key=value")
        if key.lstrip("+") == "shrink":
            shrinks = check_value({"true": True, "false": False}.get(name.lower(), name), bool, "shrink")
        elif key in (*GROUPS, "recipe"):
            if name not in (names := choices(key)):
                raise ConfigError(f"unknown {key} {name!r}{closest(name, names)} Choices: {', '.join(names)}")
            groups.append(override)
        else:
            values.append(override)
    try:
        with initialize_config_module("eyespot.configs", version_base="1.3"):
            composed = compose("train", overrides=groups)
        OmegaConf.set_struct(composed, False)
        if shrinks:
            from eyespot.training.shrink import shrink

            composed = OmegaConf.create(shrink(OmegaConf.to_container(composed, resolve=True)))  # type: ignore[arg-type]
        parser = OverridesParser.create()
        for override in values:
            try:
                parsed = parser.parse_override(override)
            except HydraException as error:
                raise ConfigError(f"override {override!r} cannot be read: {_one_line(error)}") from error
            # which keys exist is said by the typed settings below; a mapping replaces what was there
            OmegaConf.update(composed, parsed.key_or_group, parsed.value(), merge=False, force_add=True)
        composed_values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_one_line(error)) from error
    settings = from_dict(TrainSettings, composed_values)  # type: ignore[arg-type]
    check_settings(settings)
    return settings  # type: ignore[no-any-return]


def choices(group: str) -> list[str]:
    """Names of the packaged configurations of a group: recipe, vision, connector, language, data, trainer, logger."""
    return sorted(p.stem for p in (Path(__file__).parent.parent / "configs" / group).glob("*.yaml"))


GROUPS = ("vision", "connector", "language", "data", "trainer", "logger")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:3])


def train(
    settings: TrainSettings | Mapping[str, Any],
    *,
    fresh: bool = False,
    before_training: BeforeTraining | None = None,
    measure: Measure | None = None,
    console: Console | None = None,
) -> Run:
    """Train a model, in stages if the settings name some; the same call goes on where an interrupted one stopped.

    Args:
        settings: of the run, or plain values for them.
        fresh: delete what an earlier run of this name left.
        before_training: called once with the untrained model, before the first step.
        measure: called after every stage that compares pictures with texts, with the model and the samples that the
            stage held out; what it finds goes into the stage's folder and record.
        console: where progress goes.

    Raises:
        ConfigError: settings that cannot work, or that differ from those of the interrupted run.
        TrainingStopped: loss or gradient became NaN or infinite.
    """
    if not isinstance(settings, TrainSettings):
        settings = from_dict(TrainSettings, settings)
    assert isinstance(settings, TrainSettings)
    check_settings(settings)
    from eyespot.training.processes import check_processes, is_first_process, own_device

    check_trackers(settings.logger, Path(settings.output_dir) / settings.name)

    # decided now and recorded, so that a checkpoint's frozen parts are built the same way on another machine
    device = own_device(choose_device(settings.trainer.device))
    check_processes(settings.trainer, device)
    model_settings = settings.model if settings.stages is None else stages_model(settings)
    settings = replace(settings, model=with_dtypes(model_settings, device))
    console = console or Console(stderr=True)
    if not is_first_process():
        console = Console(quiet=True)
    _quiet()
    if settings.stages is not None:
        from eyespot.training.stages import train_stages

        return train_stages(settings, fresh=fresh, before_training=before_training, measure=measure, console=console)
    folder = Path(settings.output_dir) / settings.name
    # one process judges and changes the folder; the others may start at any time meanwhile, and are compared later
    resume = find_resume(folder, settings, fresh) if is_first_process() else None if fresh else last_checkpoint(folder)
    if fresh and is_first_process():
        (folder / IDS_FILE).unlink(missing_ok=True)  # else an interrupted run stays one run of its trackers
    return run_in(folder, settings, resume, before_training, console)


def run_in(
    folder: Path,
    settings: TrainSettings,
    resume: Path | None,
    before_training: BeforeTraining | None,
    console: Console,
    stage: Stage | None = None,
) -> Run:
    """A single training in its folder, from its start or from a checkpoint; what stands in the folder of a training
    that starts is deleted."""
    from eyespot.training.processes import is_first_process

    train_samples, validation, report = load_data(settings.data, settings.trainer.seed)
    if is_first_process():
        if resume is None and folder.exists():
            ids = (folder / IDS_FILE).read_text() if (folder / IDS_FILE).is_file() else None
            shutil.rmtree(folder)
            folder.mkdir(parents=True)
            if ids is not None:
                (folder / IDS_FILE).write_text(ids)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS_FILE, to_dict(settings))
        report.write(folder)
        for tracker in open_trackers(settings):
            console.print(tracker.place, markup=False)
    if stage is not None:
        stage.check_data(train_samples)
    console.print(f"data: {len(train_samples)} training and {len(validation)} validation samples")
    if report.rejected:
        console.print(report.summary(), markup=False)
    return _fit(settings, folder, resume, train_samples, validation, before_training, console, stage)


def find_resume(folder: Path, settings: TrainSettings, fresh: bool) -> Path | None:
    """The checkpoint from which an interrupted run of these settings goes on, if there is one; None when ``fresh``.

    Raises:
        ConfigError: the folder holds a finished run, one with other settings, or something else.
    """
    record = folder / SETTINGS_FILE
    if not record.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"{str(folder)!r} is not empty and holds no run; choose another name=... or output_dir=..."
            )
        return None
    if fresh:
        return None
    if (folder / "model").is_dir():
        raise ConfigError(
            f"{str(folder)!r} holds a finished run; choose another name=..., or add --fresh to replace it"
        )
    earlier, now = comparable(json.loads(record.read_text()), json.loads(json.dumps(to_dict(settings))))
    if earlier != now:
        raise ConfigError(
            f"{str(folder)!r} holds an interrupted run with another {_first_difference(earlier, now)}; use its "
            "settings to go on, another name=..., or --fresh to start over"
        )
    return last_checkpoint(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a run."""
    checkpoints = sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / "resume.ckpt").is_file())
    return checkpoints[-1] if checkpoints else None


def comparable(earlier: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two runs' settings, less what may differ when one goes on with the other's checkpoint: how the samples of a step
    are dealt out to devices, as long as there are as many, how long one waits for data or for others, and where curves
    go."""

    def samples_of_step(settings: dict[str, Any]) -> int:
        return math.prod(settings["trainer"].get(key, 1) for key in PLACEMENT)

    same_step = samples_of_step(earlier) == samples_of_step(now)
    free = {*WAITING, *(("strategy", *PLACEMENT) if same_step else ())}
    for settings in (earlier, now):
        settings["trainer"] = {key: value for key, value in settings["trainer"].items() if key not in free}
        settings.pop("logger", None)
    return earlier, now


def finished_run(settings: TrainSettings) -> Run | None:
    """The run of these settings if its training is finished, with the model loaded; None if it is not."""
    folder = Path(settings.output_dir) / settings.name
    if not (folder / "model" / RECORD_FILE).is_file():
        return None
    record = json.loads((folder / "model" / RECORD_FILE).read_text())
    curve, validation = ([(int(step), float(value)) for step, value in record[key]] for key in ("curve", "validation"))
    return Run(
        folder, settings, True, record["steps"], record["samples"], record["seconds"], curve, validation, None,
        load(folder / "model", settings.trainer.device), record.get("looks", []), record.get("warnings", []),
    )  # fmt: skip


def _first_difference(a: Any, b: Any, where: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *b]:
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    return f"{where} ({a!r}, now {b!r})"


def load_samples(settings: DataSettings) -> tuple[list[Sample], LoadReport]:
    """What the sources give and the filters let pass, and why the rest was left out.

    Raises:
        ConfigError: nothing usable was found.
    """
    samples, report = mixture.read(settings.train, settings.limit)
    if settings.filters:
        from eyespot.data import filters

        samples = filters.apply(build_parts(FILTERS, settings.filters, "data.filters"), samples, report)
    if not samples:
        raise ConfigError(f"no usable training sample; {report.summary()}")
    return samples, report


def load_data(settings: DataSettings, seed: int) -> tuple[Sequence[Sample], Sequence[Sample], LoadReport]:
    """Training and validation samples, no picture in both; filters have been over them before.

    Raises:
        ConfigError: nothing usable was found.
    """
    if settings.streaming:
        from eyespot.data.streaming import stored

        return stored(settings, seed)
    samples, report = load_samples(settings)
    if "" not in sources_of(settings.train):
        random.Random(seed).shuffle(samples)  # or the first part of the validation would be from one source
    if settings.validation is not None:
        options = {key: value for key, value in settings.validation.items() if key != "format"}
        held_out, _ = sources.load(settings.validation["format"], **options)
        sources.check_disjoint(samples, held_out)
        return samples, held_out, report
    if settings.validation_share == 0:
        return samples, [], report
    train_samples, validation = sources.split_by_image(samples, settings.validation_share, seed, report)
    if not train_samples:
        raise ConfigError(
            f"no training sample is left beside validation_share={settings.validation_share}; lower it or add data"
        )
    return train_samples, validation, report


def make_augmenter(settings: DataSettings) -> Augmenter | None:
    """What ``data.augment`` does to training samples; None if it is empty."""
    if not settings.augment:
        return None
    from eyespot.data.augmenter import Augmenter

    return Augmenter(build_parts(AUGMENTATIONS, settings.augment, "data.augment"))


def with_tokenizer(settings: ModelSettings, samples: Sequence[Sample]) -> ModelSettings:
    """The settings with every tokenizer "bpe:SIZE" learned from the texts of the samples.

    Raises:
        ConfigError: SIZE is no number, or too small.
    """
    if (name := settings.language.tokenizer or "").startswith("bpe:"):
        tokenizer = learned_tokenizer(name, samples, "model.language.tokenizer")
        settings = replace(settings, language=replace(settings.language, tokenizer=tokenizer))
    alignment = settings.alignment
    if alignment is not None and (name := alignment.tokenizer or "").startswith("bpe:"):
        tokenizer = learned_tokenizer(name, samples, "model.alignment.tokenizer")
        settings = replace(settings, alignment=replace(alignment, tokenizer=tokenizer))
    return settings


def learned_tokenizer(name: str, samples: Sequence[Sample], key: str) -> str:
    """The folder of a tokenizer "bpe:SIZE", kept in the cache by content; ``key`` is for messages."""
    digest = hashlib.sha256(name.encode())
    for text in texts_of(samples):
        digest.update(b"\0" + text.encode())
    folder = default_cache() / "tokenizers" / digest.hexdigest()[:16]
    if not folder.is_dir():
        try:
            tokenizer = bpe_tokenizer(texts_of(samples), int(name.removeprefix("bpe:")))
        except ValueError as error:
            raise ConfigError(f"{key} {name!r}: {error}") from error
        make_folder(folder, tokenizer.save_pretrained)
    return str(folder)


def texts_of(samples: Iterable[Sample]) -> Iterator[str]:
    """Everything that is said, one by one: there may be too much for the memory."""
    for sample in samples:
        for message in sample.messages:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")
    for sample in samples:
        yield from sample.captions


def precision_of(settings: TrainerSettings, device: torch.device) -> str:
    """Lightning's name for the precision: bfloat16 matrix products over float32 masters, or float32."""
    if settings.precision == "auto":
        return "bf16-mixed" if has_fast_bfloat16(device) else "32-true"
    return {"bf16": "bf16-mixed", "fp32": "32-true"}[settings.precision]


def num_workers_of(settings: TrainerSettings, device: torch.device) -> int:
    """Processes that read and resize pictures."""
    if settings.num_workers is not None:
        return settings.num_workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def _fit(
    settings: TrainSettings,
    folder: Path,
    resume: Path | None,
    train_samples: Sequence[Sample],
    validation: Sequence[Sample],
    before_training: BeforeTraining | None,
    console: Console,
    stage: Stage | None,
) -> Run:
    import lightning

    from eyespot.training.callbacks import Checkpoints, Reporter, SampleAnswers
    from eyespot.training.processes import SameStart, is_first_process

    trainer_settings = settings.trainer
    device = choose_device(trainer_settings.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    lightning.seed_everything(trainer_settings.seed, verbose=False)
    model_settings = with_tokenizer(settings.model, train_samples) if stage is None else stage.model
    model, processor = _composed(settings, model_settings, stage)
    if resume is not None:
        load_trained(model, resume)
        model.config.image_scale = json.loads((resume / "config.json").read_text())["image_scale"]
        console.print(f"going on from {resume}", markup=False)
    elif model_settings.connector.calibrate and (stage is None or stage.calibrates):
        words = make_collator(settings.data, 1, processor)
        calibrate(model, words([train_samples[:CALIBRATION_SAMPLES]]).batches, console)
    console.print(parameter_table(model))
    data = _data(settings, processor, stage, train_samples, validation, device)
    for line in data.train_units.augmentation():
        console.print(f"augmentation: {line}", markup=False)
    num_steps = min(data.sampler.num_steps, trainer_settings.max_steps or data.sampler.num_steps)
    assistant = Assistant(model, processor, str(device))
    data.collator.features = cached_features(settings, assistant, data.pictures(num_steps), console)
    if resume is None and before_training is not None and is_first_process():
        before_training(assistant)
    # what is drawn from here on must not depend on what was drawn above, say because no features were cached yet
    lightning.seed_everything(trainer_settings.seed, verbose=False)
    writer = _writer(folder, model, model_settings, processor, trainer_settings.seed, stage)
    reporter = Reporter(trainer_settings.log_every, console)
    checkpoints = Checkpoints(
        writer, trainer_settings.checkpoint_every, trainer_settings.keep_best, trainer_settings.patience
    )
    speaks = stage is None or not stage.losses
    shown = (validation or train_samples)[: trainer_settings.num_samples] if speaks else []
    lookout = _lookout(trainer_settings, num_steps, reporter, data.collator, validation if speaks else None)
    said = folder / "samples.jsonl"
    answers = SampleAnswers(shown, assistant, trainer_settings.samples_every, said, console, lookout.hear)
    start = SameStart(
        {
            "settings": to_dict(settings), "checkpoint": resume and resume.name, "number of steps": num_steps,
            "number of samples": len(train_samples),
        }
    )  # fmt: skip
    callbacks = [start, reporter, answers, lookout, checkpoints]
    trainer = make_trainer(settings, device, folder, num_steps, callbacks, validates=bool(validation))
    module = _module(model, trainer_settings, num_steps, stage)
    if resume is not None:
        module.last_good = str(resume)
    model.train()
    with naming_lost_processes(trainer, module):
        trainer.fit(module, data, ckpt_path=None if resume is None else resume / "resume.ckpt", weights_only=True)
        finished = checkpoints.stopped_by is None
        if finished:
            checkpoints.save(trainer, module)
    if trainer_settings.strategy == "fsdp" and trainer.is_global_zero:
        model, processor = load_checkpoint(Path(module.last_good))  # the model that was trained is in pieces
    assistant = Assistant(model, processor, str(device))
    if finished and trainer.is_global_zero:
        record = {
            "settings": to_dict(settings), "steps": trainer.global_step, "samples": reporter.samples_seen,
            "seconds": reporter.seconds, "curve": reporter.curve, "validation": reporter.validation,
            "measured": reporter.measured, "looks": lookout.looks, "warnings": lookout.warnings,
        }  # fmt: skip
        if stage is None:
            save_whole(model, processor, folder / "model", record)
        else:
            stage.finish(folder, record, assistant, validation[: trainer_settings.validation_limit])
    return Run(
        folder, settings, finished, trainer.global_step, reporter.samples_seen, reporter.seconds, reporter.curve,
        reporter.validation, checkpoints.stopped_by, assistant, lookout.looks, lookout.warnings,
    )  # fmt: skip


def _composed(settings: TrainSettings, model_settings: ModelSettings, stage: Stage | None) -> tuple[Any, Any]:
    """Model and processor as the training starts with them, but for what a checkpoint adds."""
    model, processor = build_from_settings(model_settings)
    if stage is not None:
        stage.prepare(model)
    if settings.trainer.gradient_checkpointing:
        # transformers 5.23 renamed it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if settings.trainer.compile:
        compile_layers(model)
    return model, processor


def make_collator(data: DataSettings, accumulate: int, processor: Any, kind: str = "instruct") -> Collator:
    """What makes batches of samples for a kind of stage."""
    from eyespot.data.collate import Collator
    from eyespot.data.objects import ObjectCollator
    from eyespot.data.pairs import PairCollator

    if kind == "detect":
        return ObjectCollator(processor)
    if kind in PAIR_KINDS:
        return PairCollator(processor, rows=processor.text_tokenizer is None, max_length=data.max_length)
    return Collator(processor, accumulate, data.max_length, data.row_length if data.packing else None)


def _data(
    settings: TrainSettings,
    processor: Any,
    stage: Stage | None,
    train_samples: Sequence[Sample],
    validation: Sequence[Sample],
    device: torch.device,
) -> VLMDataModule:
    from eyespot.data.datamodule import VLMDataModule

    data, trainer = settings.data, settings.trainer
    one_by_one = stage is not None and stage.losses
    return VLMDataModule(
        train_samples,
        validation[: trainer.validation_limit],
        make_collator(data, trainer.accumulate, processor, "instruct" if stage is None else stage.kind),
        batch_size=trainer.batch_size,
        share=data.share if data.packing and not one_by_one else 1,
        epochs=trainer.epochs,
        seed=trainer.seed,
        num_workers=num_workers_of(trainer, device),
        world=trainer.devices * trainer.num_nodes,
        weights=mixture.weights_of(data.train),
        augmenter=make_augmenter(data),
    )


def _lookout(
    settings: TrainerSettings,
    num_steps: int,
    reporter: Reporter,
    collator: Collator,
    validation: Sequence[Sample] | None,
) -> Lookout:
    """What warns. It looks at held-out pictures unless the run has none to talk about (None), the settings say no, or
    there are too few (which is said)."""
    from eyespot.training.watch import MIN_PICTURES, Lookout, Sight

    sight = None
    if settings.sight_every and validation is not None:
        sight = Sight(validation[: settings.validation_limit], collator, settings.sight_limit)
        if (found := len(sight.samples)) < MIN_PICTURES:
            reporter.console.print(
                f"nobody watches whether the model uses pictures: the validation has {found} that can be exchanged, "
                f"{MIN_PICTURES} are needed"
            )
            sight = None
    return Lookout(settings, num_steps, reporter, sight, collator.processor.tokenizer)


def _module(model: Any, settings: TrainerSettings, num_steps: int, stage: Stage | None) -> VLMModule:
    from eyespot.training.align_module import AlignModule
    from eyespot.training.detect_module import DetectModule
    from eyespot.training.module import VLMModule

    if stage is None or not stage.losses:
        return VLMModule(model, settings, num_steps)
    return (DetectModule if stage.kind == "detect" else AlignModule)(model, settings, num_steps, stage.losses)


def _writer(
    folder: Path, model: Any, model_settings: ModelSettings, processor: Any, seed: int, stage: Stage | None
) -> CheckpointWriter:
    from eyespot.training.checkpoint import CheckpointWriter
    from eyespot.training.processes import is_first_process

    earlier = None
    if is_first_process():
        processor.save_pretrained(folder / "processor")
        earlier = None if stage is None else stage.write_earlier(folder)
    train = None if stage is None else stage.train
    return CheckpointWriter(folder / "checkpoints", model, model_settings, seed, folder / "processor", train, earlier)


def make_trainer(
    settings: TrainSettings,
    device: torch.device,
    folder: Path,
    num_steps: int,
    callbacks: list[Any],
    *,
    validates: bool,
) -> Any:
    """Lightning's trainer, with nothing of its own: order, checkpoints and progress are ours."""
    import lightning

    from eyespot.training.processes import cluster, is_first_process, strategy_of

    return lightning.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=settings.trainer.devices,
        num_nodes=settings.trainer.num_nodes,
        strategy=strategy_of(settings.trainer),
        plugins=[cluster()],
        precision=precision_of(settings.trainer, device),  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=num_steps,
        val_check_interval=min(settings.trainer.validate_every, num_steps),
        limit_val_batches=1.0 if validates else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=loggers(settings, folder, first_process=is_first_process()),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )


@contextmanager
def naming_lost_processes(trainer: Any, module: Any) -> Iterator[None]:
    """Errors inside that come from another process's end become a ProcessLost that says whose, and how to go on."""
    from eyespot.training.module import ProcessLost, TrainingStopped
    from eyespot.training.processes import lost_process

    try:
        yield
    except TrainingStopped:
        raise
    except RuntimeError as error:
        if (lost := lost_process(trainer.strategy, error)) is None:
            raise
        raise ProcessLost(
            f"{lost}; stopped at step {trainer.global_step}; last good checkpoint: {module.last_good}; the same "
            "command goes on from there"
        ) from error


def calibrate(model: Any, batches: list[dict[str, torch.Tensor]], console: Console) -> None:
    """Bring image embeddings to the size of text embeddings (Gemma multiplies its own by the root of its width)."""
    batch = next((b for b in batches if "pixel_values" in b), None)
    if batch is None:
        return
    real = batch["documents"] >= 0 if "documents" in batch else batch["attention_mask"] == 1
    pixels, words = batch["pixel_values"].to(model.device), batch["input_ids"][real].to(model.device)
    before = model.calibrate(pixels, words)
    after = model.image_text_ratio(pixels, words)
    console.print(f"size of image to text embeddings (RMS): {before:.3g} before, {after:.3g} after scaling")
    if not 0.5 <= after <= 2 or not math.isfinite(after):
        raise ConfigError(
            f"image embeddings are {after:.3g} times the size of text embeddings; check the vision encoder"
        )


def cached_features(
    settings: TrainSettings, assistant: Assistant, pictures: Iterable[ImageSource], console: Console
) -> FeatureStore | None:
    """The features of the pictures on disk, computed where they were missing; None if the encoder learns, the settings
    say no, pictures are augmented or features do not fit (which is said)."""
    from eyespot.data.features import CacheFull, fill

    model, processor = assistant.model, assistant.processor
    if not settings.data.cache_features or any(p.requires_grad for p in model.vision.parameters()):
        return None
    if settings.data.augment:
        console.print("every step encodes its pictures, because data.augment changes them from visit to visit")
        return None
    store, encode = feature_store(settings, assistant)
    started = time.perf_counter()
    try:
        with one_at_a_time(store.folder):  # the other processes wait, and find what the first one encoded
            store.refresh()
            done = fill(
                store, pictures, processor, encode, limit_bytes=settings.data.cache_gb * 1e9,
                num_workers=num_workers_of(settings.trainer, assistant.device), console=console,
            )  # fmt: skip
    except CacheFull as error:
        console.print(f"every step encodes its pictures: {error}", markup=False)
        return None
    if done:
        seconds = time.perf_counter() - started
        console.print(f"features of {done:,} pictures cached in {seconds:.0f} s ({done / seconds:.0f} a second)")
    return store


def feature_store(
    settings: TrainSettings, assistant: Assistant
) -> tuple[FeatureStore, Callable[[torch.Tensor], torch.Tensor]]:
    """Where a run's features are kept, and what makes them: pixel values float [N, 3, H, W] -> float [N, P, E]."""
    from eyespot.data.features import FeatureStore, describe, encoder_key, features_root

    model, device = assistant.model, assistant.device
    precision = precision_of(settings.trainer, device)
    store = FeatureStore(features_root() / encoder_key(model, assistant.processor, f"{precision} {device.type}"))
    describe(store.folder, model)

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            features: torch.Tensor = model.encode_images(pixels.to(device))
        return features

    return store, encode


def fill_features(settings: TrainSettings, console: Console) -> None:
    """Encode all pictures of a run beforehand, so that training and its repetitions find them.

    Raises:
        ConfigError: see ``to_be_encoded``.
    """
    settings, pictures = to_be_encoded(settings, console)
    cached_features(settings, untrained(settings), pictures, console)


def to_be_encoded(settings: TrainSettings, console: Console) -> tuple[TrainSettings, Iterator[ImageSource]]:
    """All pictures of a run whose encoder is frozen, and its settings with everything decided.

    Raises:
        ConfigError: the encoder of the recipe learns, pictures are augmented, or the cache is switched off.
    """
    if settings.data.augment:
        raise ConfigError(
            f"data.augment is {settings.data.augment}, so no picture is seen twice alike; only features of pictures "
            "that stay can be kept, with data.augment={}"
        )
    if settings.model.vision.train != "frozen" or not settings.data.cache_features:
        raise ConfigError(
            f"model.vision.train is {settings.model.vision.train!r} and data.cache_features is "
            f"{settings.data.cache_features}; only features of a frozen encoder can be kept, with cache_features=true"
        )
    _quiet()
    device = choose_device(settings.trainer.device)
    train_samples, validation, report = load_data(settings.data, settings.trainer.seed)
    console.print(report.summary(), markup=False)
    model_settings = with_tokenizer(with_dtypes(settings.model, device), train_samples)
    pictures = (image for sample in itertools.chain(train_samples, validation) for image in sample.images)
    return replace(settings, model=model_settings), pictures


def untrained(settings: TrainSettings) -> Assistant:
    """The model of a run before its first step."""
    torch.manual_seed(settings.trainer.seed)  # a frozen part may be random
    return Assistant(*build_from_settings(settings.model), settings.trainer.device)


def save_whole(model: Any, processor: Any, folder: Path, record: dict[str, Any]) -> None:
    """The final transformers folder, with the record of its training and, unless that says it already, where it was
    trained; it appears whole or not at all."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, processor, partial)
    write_json(partial / RECORD_FILE, {"origin": origin(), **record})
    os.replace(partial, folder)


def write_json(path: Path, values: Any) -> None:
    """A file that appears whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(values, indent=2), encoding="utf-8")
    os.replace(partial, path)


def _quiet() -> None:
    """Banners and bars of the libraries say nothing that eyespot does not say itself."""
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*litlogger.*|.*tensorboardX.*|.*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*You have overridden `transfer_batch_to_device`.*")
    warnings.filterwarnings("ignore", message=".*is not\n? *resumable.*|.*dataloader.*resumable.*")  # ours is
    # convolutions with channel beside channel; of weights of 1 x 1 both orders are the same
    warnings.filterwarnings("ignore", message=".*Grad strides do not match bucket view strides.*")
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")  # frozen parts are, on purpose
