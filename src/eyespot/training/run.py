"""A run from its settings to a trained folder: the composition root of training."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from eyespot.compose import build_from_settings, load_trained, save, with_dtypes
from eyespot.config import (
    ConfigError,
    DataSettings,
    ModelSettings,
    TrainerSettings,
    TrainSettings,
    check_settings,
    from_dict,
    to_dict,
)
from eyespot.data import sources
from eyespot.data.sample import ImageSource, LoadReport, Sample
from eyespot.devices import choose_device, has_fast_bfloat16
from eyespot.files import default_cache, make_folder
from eyespot.inference import Assistant, load
from eyespot.models.compiling import compile_layers
from eyespot.models.parameters import parameter_table
from eyespot.processing.tokenizers import bpe_tokenizer
from eyespot.registry import closest

if TYPE_CHECKING:
    from eyespot.data.features import FeatureStore

BeforeTraining = Callable[[Assistant], None]
RECORD_FILE = "training.json"
SETTINGS_FILE = "settings.json"
CALIBRATION_SAMPLES = 32


@dataclass
class Run:
    """What a run left behind; samples and seconds are those of training alone.

    finished is False when the run was stopped; the same command goes on from its checkpoint.
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

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"


def compose_settings(overrides: Sequence[str]) -> TrainSettings:
    """Settings from command-line overrides: ``["recipe=quickstart", "trainer.batch_size=16", "vision=vit_tiny"]``.

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
    groups, values = [], []
    for override in overrides:
        key, equals, name = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no value; write key=value")
        if key in (*GROUPS, "recipe"):
            if name not in (names := choices(key)):
                raise ConfigError(f"unknown {key} {name!r}{closest(name, names)} Choices: {', '.join(names)}")
            groups.append(override)
        else:
            values.append(override)
    try:
        with initialize_config_module("eyespot.configs", version_base="1.3"):
            composed = compose("train", overrides=groups)
        OmegaConf.set_struct(composed, False)
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
    console: Console | None = None,
) -> Run:
    """Train a model; the same call goes on where an interrupted one stopped.

    Args:
        settings: of the run, or plain values for them.
        fresh: delete what an earlier run of this name left.
        before_training: called once with the untrained model, before the first step.
        console: where progress goes.

    Raises:
        ConfigError: settings that cannot work, or that differ from those of the interrupted run.
        TrainingStopped: loss or gradient became NaN or infinite.
    """
    if not isinstance(settings, TrainSettings):
        settings = from_dict(TrainSettings, settings)
    assert isinstance(settings, TrainSettings)
    check_settings(settings)
    # decided now and recorded, so that a checkpoint's frozen parts are built the same way on another machine
    device = choose_device(settings.trainer.device)
    settings = replace(settings, model=with_dtypes(settings.model, device))
    console = console or Console(stderr=True)
    if not is_first_process():
        console = Console(quiet=True)
    folder = Path(settings.output_dir) / settings.name
    resume = find_resume(folder, settings, fresh)
    _quiet()
    train_samples, validation, report = load_data(settings.data, settings.trainer.seed)
    if is_first_process():
        if resume is None and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / SETTINGS_FILE, to_dict(settings))
        (folder / "data_report.txt").write_text(report.summary() + "\n", encoding="utf-8")
    console.print(f"data: {len(train_samples)} training and {len(validation)} validation samples")
    if report.rejected:
        console.print(report.summary(), markup=False)
    return _fit(settings, folder, resume, train_samples, validation, before_training, console)


def is_first_process() -> bool:
    """False in the further processes that Lightning starts, one for each further device; they write nothing."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


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
    earlier, now = json.loads(record.read_text()), json.loads(json.dumps(to_dict(settings)))
    if earlier != now:
        raise ConfigError(
            f"{str(folder)!r} holds an interrupted run with another {_first_difference(earlier, now)}; use its "
            "settings to go on, another name=..., or --fresh to start over"
        )
    checkpoints = sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / "resume.ckpt").is_file())
    return checkpoints[-1] if checkpoints else None


def finished_run(settings: TrainSettings) -> Run | None:
    """The run of these settings if its training is finished, with the model loaded; None if it is not."""
    folder = Path(settings.output_dir) / settings.name
    if not (folder / "model" / RECORD_FILE).is_file():
        return None
    record = json.loads((folder / "model" / RECORD_FILE).read_text())
    curve, validation = ([(int(step), float(value)) for step, value in record[key]] for key in ("curve", "validation"))
    return Run(
        folder, settings, True, record["steps"], record["samples"], record["seconds"], curve, validation, None,
        load(folder / "model", settings.trainer.device),
    )  # fmt: skip


def _first_difference(a: Any, b: Any, where: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *b]:
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    return f"{where} ({a!r}, now {b!r})"


def load_data(settings: DataSettings, seed: int) -> tuple[list[Sample], list[Sample], LoadReport]:
    """Training and validation samples, no picture in both.

    Raises:
        ConfigError: nothing usable was found.
    """
    options = {key: value for key, value in settings.train.items() if key != "format"}
    samples, report = sources.load(settings.train["format"], limit=settings.limit, **options)
    if not samples:
        raise ConfigError(f"no usable training sample; {report.summary()}")
    if settings.validation_share == 0:
        return samples, [], report
    train_samples, validation = sources.split_by_image(samples, settings.validation_share, seed, report)
    if not train_samples:
        raise ConfigError(
            f"no training sample is left beside validation_share={settings.validation_share}; lower it or add data"
        )
    return train_samples, validation, report


def with_tokenizer(settings: ModelSettings, samples: Sequence[Sample]) -> ModelSettings:
    """The settings with a tokenizer "bpe:SIZE" learned from the texts of the samples, kept in the cache by content.

    Raises:
        ConfigError: SIZE is no number, or too small.
    """
    name = settings.language.tokenizer or ""
    if not name.startswith("bpe:"):
        return settings
    texts = [
        part["text"]
        for sample in samples
        for message in sample.messages
        for part in message["content"]
        if part["type"] == "text"
    ] + [caption for sample in samples for caption in sample.captions]
    digest = hashlib.sha256("\0".join([name, *texts]).encode()).hexdigest()
    folder = default_cache() / "tokenizers" / digest[:16]
    if not folder.is_dir():
        try:
            tokenizer = bpe_tokenizer(texts, int(name.removeprefix("bpe:")))
        except ValueError as error:
            raise ConfigError(f"model.language.tokenizer {name!r}: {error}") from error
        make_folder(folder, tokenizer.save_pretrained)
    return replace(settings, language=replace(settings.language, tokenizer=str(folder)))


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
    train_samples: list[Sample],
    validation: list[Sample],
    before_training: BeforeTraining | None,
    console: Console,
) -> Run:
    import lightning

    from eyespot.data.collate import Collator
    from eyespot.data.datamodule import VLMDataModule
    from eyespot.training.callbacks import Checkpoints, Reporter, SampleAnswers
    from eyespot.training.checkpoint import CheckpointWriter
    from eyespot.training.module import VLMModule

    trainer_settings = settings.trainer
    device = choose_device(trainer_settings.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    lightning.seed_everything(trainer_settings.seed, verbose=False)
    model_settings = with_tokenizer(settings.model, train_samples)
    model, processor = build_from_settings(model_settings)
    if trainer_settings.gradient_checkpointing:
        # transformers 5.23 renamed it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if trainer_settings.compile:
        compile_layers(model)
    row_length = settings.data.row_length if settings.data.packing else None
    collator = Collator(processor, trainer_settings.accumulate, settings.data.max_length, row_length)
    if resume is None and model_settings.connector.calibrate:
        calibrate(model, collator([train_samples[:CALIBRATION_SAMPLES]]).batches, console)
    if resume is not None:
        load_trained(model, resume)
        model.config.image_scale = json.loads((resume / "config.json").read_text())["image_scale"]
        console.print(f"going on from {resume}", markup=False)
    console.print(parameter_table(model))
    data = VLMDataModule(
        train_samples,
        validation[: trainer_settings.validation_limit],
        collator,
        batch_size=trainer_settings.batch_size,
        share=settings.data.share if settings.data.packing else 1,
        epochs=trainer_settings.epochs,
        seed=trainer_settings.seed,
        num_workers=num_workers_of(trainer_settings, device),
        world=trainer_settings.devices,
    )
    num_steps = min(data.sampler.num_steps, trainer_settings.max_steps or data.sampler.num_steps)
    assistant = Assistant(model, processor, str(device))
    collator.features = cached_features(settings, assistant, data.pictures(num_steps), console)
    if resume is None and before_training is not None and is_first_process():
        before_training(assistant)
        lightning.seed_everything(trainer_settings.seed, verbose=False)
    if is_first_process():
        processor.save_pretrained(folder / "processor")
    writer = CheckpointWriter(
        folder / "checkpoints", model, model_settings, trainer_settings.seed, folder / "processor"
    )
    reporter = Reporter(trainer_settings.log_every, console)
    checkpoints = Checkpoints(
        writer, trainer_settings.checkpoint_every, trainer_settings.keep_best, trainer_settings.patience
    )
    shown = (validation or train_samples)[: trainer_settings.num_samples]
    answers = SampleAnswers(shown, assistant, trainer_settings.samples_every, folder / "samples.jsonl", console)
    trainer = lightning.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=trainer_settings.devices,
        # a device whose samples have no picture leaves the connector unused
        strategy="ddp_find_unused_parameters_true" if trainer_settings.devices > 1 else "auto",
        precision=precision_of(trainer_settings, device),  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=num_steps,
        val_check_interval=min(trainer_settings.validate_every, num_steps),
        limit_val_batches=1.0 if validation else 0,
        num_sanity_val_steps=0,
        callbacks=[reporter, answers, checkpoints],
        logger=_loggers(settings, folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    module = VLMModule(model, trainer_settings, num_steps)
    if resume is not None:
        module.last_good = str(resume)
    model.train()
    trainer.fit(module, data, ckpt_path=None if resume is None else resume / "resume.ckpt", weights_only=True)
    finished = checkpoints.stopped_by is None
    if finished:
        checkpoints.save(trainer, module)
        record = {
            "settings": to_dict(settings), "steps": trainer.global_step, "samples": reporter.samples_seen,
            "seconds": reporter.seconds, "curve": reporter.curve, "validation": reporter.validation,
        }  # fmt: skip
        if trainer.is_global_zero:
            save_whole(model, processor, folder / "model", record)
    return Run(
        folder, settings, finished, trainer.global_step, reporter.samples_seen, reporter.seconds, reporter.curve,
        reporter.validation, checkpoints.stopped_by, Assistant(model, processor, str(device)),
    )  # fmt: skip


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
    say no, or they do not fit (which is said)."""
    from eyespot.data.features import CacheFull, FeatureStore, describe, encoder_key, features_root, fill

    model, processor = assistant.model, assistant.processor
    if not settings.data.cache_features or any(p.requires_grad for p in model.vision.parameters()):
        return None
    precision = precision_of(settings.trainer, assistant.device)
    store = FeatureStore(features_root() / encoder_key(model, processor, f"{precision} {assistant.device.type}"))
    bfloat16 = torch.autocast(assistant.device.type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed")

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with bfloat16:
            features: torch.Tensor = model.encode_images(pixels.to(assistant.device))
        return features

    describe(store.folder, model)
    started = time.perf_counter()
    try:
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


def fill_features(settings: TrainSettings, console: Console) -> None:
    """Encode all pictures of a run beforehand, so that training and its repetitions find them.

    Raises:
        ConfigError: the encoder of the recipe learns, or the cache is switched off.
    """
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
    torch.manual_seed(settings.trainer.seed)  # a frozen part may be random
    model, processor = build_from_settings(model_settings)
    pictures = (image for sample in [*train_samples, *validation] for image in sample.images)
    cached_features(settings, Assistant(model, processor, str(device)), pictures, console)


def save_whole(model: Any, processor: Any, folder: Path, record: dict[str, Any]) -> None:
    """The final transformers folder, with the record of its training; it appears whole or not at all."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, processor, partial)
    _write_json(partial / RECORD_FILE, record)
    os.replace(partial, folder)


def _loggers(settings: TrainSettings, folder: Path) -> Any:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    loggers: list[Any] = []
    if settings.logger.csv:
        loggers.append(CSVLogger(folder, name="logs", version="csv"))
    if settings.logger.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="logs", version="tensorboard"))
    return loggers


def _write_json(path: Path, values: Any) -> None:
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
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")  # frozen parts are, on purpose
