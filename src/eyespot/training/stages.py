"""Several trainings in one run, each from the weights that the one before left.

Every stage is a run of its own in stages/NUMBER-NAME, resumable at every step; its ``training.json`` says that it is
finished. All stages compose the same model, from the same seed, and differ in what learns; so what a stage starts from
is the composed model with the tensors that earlier stages have trained. They lie beside its own in each of its
checkpoints, hard-linked, which makes a checkpoint of any stage whole. The model of the last stage becomes that of the
run.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from eyespot.compose import EARLIER_FILE, all_trained, load_parts
from eyespot.config import (
    KIND_LOSSES,
    PAIR_KINDS,
    ConfigError,
    ModelSettings,
    PreferenceData,
    PreferenceTrainer,
    StageSettings,
    TrainSettings,
    from_dict,
    stage_losses,
    stage_settings,
    to_dict,
)
from eyespot.data import mixture
from eyespot.data.objects import objects_of
from eyespot.data.pairs import pair_of, usable_samples
from eyespot.data.sample import Sample
from eyespot.inference import Assistant
from eyespot.models.vlm import VLM
from eyespot.training.processes import from_all, is_first_process
from eyespot.training.run import (
    RECORD_FILE,
    BeforeTraining,
    Run,
    find_resume,
    last_checkpoint,
    load_data,
    run_in,
    save_whole,
    with_tokenizer,
    write_json,
)

Measure = Callable[[Assistant, Sequence[Sample]], Mapping[str, Any]]
MEASURE_FILE = "retrieval.json"
LOOKED_AT = 16  # samples of each stage that are read before the first one starts


@dataclass(frozen=True)
class Stage:
    """What makes a run a stage.

    model: what all stages compose, tokenizers included. train: part to mode. losses: by name; none means the language
    model's. calibrates: pictures meet the language model for the first time. before: the last checkpoint of
    the stage before, None of a first one. measure: how well texts and pictures are found, told by the trained model and
    samples that it has not learned from.
    """

    name: str
    kind: str
    model: ModelSettings
    train: dict[str, Any]
    losses: dict[str, float]
    calibrates: bool
    before: Path | None
    measure: Measure | None

    def check_data(self, samples: Sequence[Sample]) -> None:
        """Raise ConfigError if the stage compares pictures with texts, or looks for objects, and no sample has any."""
        if not self.losses:
            return
        usable, reasons = usable_samples(samples, objects_of if self.kind == "detect" else pair_of)
        if not usable:
            wants = "looks for objects" if self.kind == "detect" else "compares pictures with texts"
            raise ConfigError(f"stage {self.name!r} {wants}; none of {len(samples)} samples is usable: {reasons[0]}")

    def prepare(self, model: VLM) -> None:
        """Set what learns, and put the tensors of earlier stages over a model that was just composed."""
        model.set_trainable(**self.train)
        if self.before is not None:
            model.load_state_dict(all_trained(self.before), strict=False)
            model.config.image_scale = json.loads((self.before / "config.json").read_text())["image_scale"]

    def write_earlier(self, folder: Path) -> Path | None:
        """The tensors of earlier stages in one file, for the checkpoints of this one to link; it is written once."""
        if self.before is None:
            return None
        from safetensors.torch import save_file

        file = folder / EARLIER_FILE
        if not file.is_file():
            partial = folder / f".partial-{EARLIER_FILE}"
            save_file(all_trained(self.before), partial)
            os.replace(partial, file)
        return file

    def finish(self, folder: Path, record: dict[str, Any], assistant: Assistant, held_out: Sequence[Sample]) -> None:
        """Write the record, which ends the stage; before it, what ``measure`` finds on samples that were held out."""
        pairs, _ = usable_samples(held_out, pair_of)
        if self.kind in PAIR_KINDS and self.measure is not None and pairs:
            record["retrieval"] = dict(self.measure(assistant, pairs))
            write_json(folder / MEASURE_FILE, record["retrieval"])
        write_json(folder / RECORD_FILE, {"stage": self.name, "train": self.train, "losses": self.losses, **record})


def train_stages(
    settings: TrainSettings,
    *,
    fresh: bool,
    before_training: BeforeTraining | None,
    measure: Measure | None,
    console: Console,
) -> Run:
    """Run the stages that are not finished yet, then write the model; see ``eyespot.training.run.train``.

    Args:
        settings: checked, every dtype decided, the model that of ``stages_model``.
        measure: called at the end of each stage that compares pictures with texts, with what it held out.
    """
    folder = Path(settings.output_dir) / settings.name
    if is_first_process():
        find_resume(folder, settings, fresh)
        if fresh and folder.exists():
            shutil.rmtree(folder)
        check_stage_data(settings)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", to_dict(settings))
    stages = settings.stages or []
    # the other processes may start before the first one has deleted anything
    done = 0 if fresh else num_finished(settings)
    if is_first_process():
        for number in range(done + 1, len(stages)):  # what came of a stage that is not there any more
            shutil.rmtree(folder_of(settings, number), ignore_errors=True)
    model = with_tokenizer(settings.model, training_texts(settings))
    for number in range(done, len(stages)):
        stage = stages[number]
        console.print(f"stage {number + 1} of {len(stages)}: {stage.name} ({stage.kind})", markup=False)
        if stage.kind == "preference":
            prefer(settings, number, console)
            continue
        run = run_in(
            folder_of(settings, number),
            stage_settings(settings, number),
            None if fresh and number == 0 else last_checkpoint(folder_of(settings, number)),
            before_training if number == 0 else None,
            console,
            stage_of(settings, number, model, measure),
        )
        from_all(None)  # nobody looks for what the first process is still writing
        if not run.finished:
            return replace(run, folder=folder, settings=settings)
    return finish(settings, folder)


def stage_of(settings: TrainSettings, number: int, model: ModelSettings, measure: Measure | None) -> Stage:
    """A stage as its run needs it."""
    stages = settings.stages or []
    first = next((i for i, stage in enumerate(stages) if _speaks(stage, settings.model)), None)
    return Stage(
        stages[number].name,
        stages[number].kind,
        model,
        to_dict(stages[number].train),
        stage_losses(stages[number]),
        number == first,
        result_of(settings, number - 1) if number else None,
        measure,
    )


def _speaks(stage: StageSettings, model: ModelSettings) -> bool:
    """Whether the language model reads pictures in a stage."""
    if stage.kind in PAIR_KINDS:
        return model.alignment is not None and model.alignment.tokenizer is None
    return stage.kind not in KIND_LOSSES


def folder_of(settings: TrainSettings, number: int) -> Path:
    """stages/NUMBER-NAME of the run's folder."""
    name = (settings.stages or [])[number].name
    return Path(settings.output_dir) / settings.name / "stages" / f"{number}-{name}"


def num_finished(settings: TrainSettings) -> int:
    """How many stages from the first one on are finished."""
    stages = range(len(settings.stages or []))
    finished = itertools.takewhile(lambda number: (folder_of(settings, number) / RECORD_FILE).is_file(), stages)
    return sum(1 for _ in finished)


def result_of(settings: TrainSettings, number: int) -> Path:
    """What a finished stage left: its last checkpoint, or the folder of a model.

    Raises:
        ConfigError: it is not there any more.
    """
    folder = folder_of(settings, number)
    result = folder / "model" if (folder / "model").is_dir() else last_checkpoint(folder)
    if result is None:
        raise ConfigError(f"{str(folder)!r} is finished but has no checkpoint; add --fresh to start over")
    return result


def check_stage_data(settings: TrainSettings) -> None:
    """Read the beginning of every stage's data, so that a wrong path is found before the first stage has run for hours.

    Raises:
        ConfigError: no usable sample, or no pair for a stage that compares pictures with texts.
        ValueError, ImportError: what the reader of the format finds wrong.
    """
    for number, stage in enumerate(settings.stages or []):
        if stage.kind == "preference":
            from eyespot.training.preference import _trl, read_preferences

            _trl()
            read_preferences(**asdict(from_dict(PreferenceData, stage.data)))
            continue
        samples, report = mixture.read(stage_settings(settings, number).data.train, LOOKED_AT)
        if not samples:
            raise ConfigError(f"stage {stage.name!r} has no usable training sample; {report.summary()}")
        stage_of(replace(settings, stages=[stage]), 0, settings.model, None).check_data(samples)


def training_texts(settings: TrainSettings) -> list[Sample]:
    """The training samples of all stages, if a tokenizer is to be learned from them; none otherwise."""
    alignment = settings.model.alignment
    names = [settings.model.language.tokenizer, alignment.tokenizer if alignment is not None else None]
    if not any(name and name.startswith("bpe:") for name in names):
        return []
    seen: list[Any] = []
    samples: list[Sample] = []
    for number, stage in enumerate(settings.stages or []):
        if stage.kind == "preference":
            continue
        own = stage_settings(settings, number)
        if own.data not in seen:
            seen.append(own.data)
            samples += load_data(own.data, own.trainer.seed)[0]
    return samples


def prefer(settings: TrainSettings, number: int, console: Console) -> None:
    """The last stage by TRL, from the checkpoint before it to a model folder; interrupted, it starts over."""
    from eyespot.training.preference import run_preference

    stage, folder = (settings.stages or [])[number], folder_of(settings, number)
    data, trainer = from_dict(PreferenceData, stage.data), from_dict(PreferenceTrainer, stage.trainer)
    started = time.perf_counter()
    if not (folder / "model").is_dir():
        run_preference(
            result_of(settings, number - 1), data.path, folder / "model", image_folder=data.image_folder,
            seed=settings.trainer.seed, device=settings.trainer.device, console=console, **asdict(trainer),
        )  # fmt: skip
    told = json.loads((folder / "model" / RECORD_FILE).read_text())["preference"]
    steps = len(told["losses"])
    record = {
        "stage": stage.name, "train": to_dict(stage.train), "losses": {}, "steps": steps,
        "samples": steps * trainer.batch_size * trainer.accumulate, "seconds": time.perf_counter() - started,
        "curve": list(enumerate(told["losses"], 1)), "validation": [], "margins": told["margins"],
    }  # fmt: skip
    write_json(folder / RECORD_FILE, record)


def finish(settings: TrainSettings, folder: Path) -> Run:
    """The model of the last stage as the run's own, with the records of all stages."""
    stages = range(len(settings.stages or []))
    records = [json.loads((folder_of(settings, number) / RECORD_FILE).read_text()) for number in stages]
    steps, samples = (sum(record[key] for record in records) for key in ("steps", "samples"))
    seconds = sum(record["seconds"] for record in records)
    curve, validation = ([(int(step), float(v)) for step, v in records[-1][key]] for key in ("curve", "validation"))
    run = Run(folder, settings, True, steps, samples, seconds, curve, validation, looks=records[-1].get("looks", []))
    run.warnings = [
        {**warning, "text": f"stage {record['stage']}: {warning['text']}"}
        for record in records
        for warning in record.get("warnings", [])
    ]
    if not is_first_process():
        return run
    model, processor = load_parts(result_of(settings, stages[-1]))
    record = {
        "settings": to_dict(settings), "steps": steps, "samples": samples, "seconds": seconds, "curve": curve,
        "validation": validation, "looks": run.looks, "warnings": run.warnings, "stages": records,
    }  # fmt: skip
    save_whole(model, processor, folder / "model", record)
    run.assistant = Assistant(model, processor, settings.trainer.device)
    return run
