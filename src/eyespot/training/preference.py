"""Preference learning: answers that people prefer become likelier than those they reject, through TRL.

Source: direct preference optimization, arXiv 2305.18290.
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback

from eyespot.compose import load_parts
from eyespot.config import ConfigError
from eyespot.data.formats.records import BadRecord, existing_file, image_file, json_lines, record_id
from eyespot.data.sample import LoadReport
from eyespot.devices import choose_device, has_fast_bfloat16
from eyespot.inference import Assistant, user_turn
from eyespot.models.vlm import VLM
from eyespot.processing.processor import IGNORE_INDEX
from eyespot.training.origin import origin
from eyespot.training.run import RECORD_FILE, save_whole


@dataclass(frozen=True)
class Pair:
    """A question about pictures with a preferred and a rejected answer."""

    id: str
    images: tuple[str, ...]
    prompt: str
    chosen: str
    rejected: str


@dataclass
class Preference:
    """What a run left: the model's folder, and for every step the loss and the margin.

    The margin is beta times the mean of log p(chosen) - log p(rejected), minus the same of the model before training.
    """

    folder: Path
    losses: list[float]
    margins: list[float]


def read_preferences(path: str | Path, image_folder: str | Path | None = None) -> tuple[list[Pair], LoadReport]:
    """Lines ``{"image": name or "images": [names], "question" or "prompt": text, "chosen": text, "rejected": text}``.

    Args:
        path: the JSON lines file.
        image_folder: where relative names start; the folder of the file unless given.

    Raises:
        ConfigError: no usable line. ValueError: the file does not exist or is not UTF-8 text.
    """
    file = existing_file(path)
    folder = file.parent if image_folder is None else image_folder
    pairs, report = [], LoadReport()
    for number, record in json_lines(file):
        id = f"{file.stem}:{number}"
        try:
            if isinstance(record, BadRecord):
                raise record
            pairs.append(_pair(record_id(record, id), record, folder))
        except BadRecord as bad:
            report.rejected.append(bad.rejected(id))
    report.accepted = len(pairs)
    if not pairs:
        raise ConfigError(f"no usable preference in {str(path)!r}; {report.summary()}")
    return pairs, report


def _pair(id: str, record: dict[str, Any], folder: str | Path) -> Pair:
    if "question" in record and "prompt" in record:
        raise BadRecord("record has both 'question' and 'prompt'")
    names = record.get("images", [record["image"]] if "image" in record else [])
    if not isinstance(names, list):
        raise BadRecord("'images' is not a list", repr(names)[:80])
    texts = {key: record.get(key) for key in ("question" if "question" in record else "prompt", "chosen", "rejected")}
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise BadRecord(f"{key} is not a text", repr(text)[:80])
    if texts["chosen"] == texts["rejected"]:
        raise BadRecord("chosen and rejected are equal", repr(texts["chosen"])[:80])
    prompt, chosen, rejected = map(str, texts.values())
    return Pair(id, tuple(image_file(name, folder) for name in names), prompt, chosen, rejected)


class PreferenceCollator:
    """Pairs -> the batch of TRL's DPOTrainer: all chosen conversations, then all rejected ones.

    Rows are those that eyespot trains: input_ids, attention_mask and completion_mask int64 [2B, T], image_features
    float [2N, P, E]; a picture is encoded once.

    Args:
        assistant: the model in training, for its processor and its frozen encoder.
        max_length: longer conversations are cut there.
    """

    def __init__(self, assistant: Assistant, max_length: int | None) -> None:
        self.assistant, self.max_length = assistant, max_length

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        processor = self.assistant.processor
        rows = [
            processor.encode_conversation(
                [*user_turn(example["images"], example["prompt"]), {"role": "assistant", "content": example[side]}],
                self.max_length,
            )
            for side in ("chosen", "rejected")
            for example in examples
        ]
        batch = processor.pad(rows, "right")
        batch["completion_mask"] = (batch.pop("labels") != IGNORE_INDEX).long()
        if images := [image for example in examples for image in example["images"]]:
            batch["image_features"] = self.assistant.features(images).clone().repeat(2, 1, 1)
        return batch


def run_preference(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    image_folder: str | Path | None = None,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 5e-6,
    beta: float = 0.1,
    max_length: int | None = 1024,
    seed: int = 42,
    device: str = "auto",
    console: Console | None = None,
) -> Preference:
    """Train a model on preferences and save it as a folder like the one it came from.

    The language model's adapters learn if it has some, else the whole language model; the rest is frozen. The reference
    is the model as it was.

    Args:
        model: folder that training wrote. data: see ``read_preferences``. out: the new folder.
        epochs, max_steps, batch_size, accumulate, lr, seed: of AdamW's steps; a batch counts pairs.
        beta: how dearly distance from the reference is paid.
        max_length: tokens at which a conversation is cut.

    Raises:
        ConfigError: a setting or the data cannot be used, or ``out`` exists. ImportError: TRL is not installed.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("accumulate", accumulate), ("beta", beta)):
        if value <= 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    if Path(out).exists():
        raise ConfigError(f"{str(out)!r} exists; give another folder for the model that is made")
    trainer_class, config_class, dataset_class = _trl()
    console = console or Console(stderr=True)
    pairs, report = read_preferences(data, image_folder)
    console.print(f"preferences: {report.summary()}", markup=False)
    chosen_device = choose_device(device)
    fast = has_fast_bfloat16(chosen_device)
    policy, processor = _prepared(model, fast, learns=True)
    reference, _ = _prepared(model, fast, learns=False)
    assistant = Assistant(policy, processor, str(chosen_device))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = config_class(
            output_dir=scratch, num_train_epochs=epochs, max_steps=max_steps or -1, learning_rate=lr, beta=beta,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate, seed=seed,
            max_length=max_length, bf16=fast, use_cpu=chosen_device.type == "cpu", report_to=[], save_strategy="no",
            logging_steps=1, gradient_checkpointing=False, disable_tqdm=not console.is_terminal,
        )  # fmt: skip
        trainer = trainer_class(
            model=policy, ref_model=reference, args=arguments, processing_class=processor,
            train_dataset=dataset_class.from_list([asdict(pair) for pair in pairs]),
            data_collator=PreferenceCollator(assistant, max_length),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        with torch.autocast(chosen_device.type, enabled=False):  # accelerate may leave it on behind it
            trainer.train()
    steps = [row for row in trainer.state.log_history if "rewards/margins" in row]
    result = Preference(Path(out), [row["loss"] for row in steps], [row["rewards/margins"] for row in steps])
    _save(policy, processor, result, Path(model), {"data": str(data), "lr": lr, "beta": beta, "seed": seed})
    return result


def _trl() -> tuple[Any, Any, Any]:
    try:
        datasets, trl = map(importlib.import_module, ("datasets", "trl"))
    except ImportError as error:
        raise ImportError('preference learning needs TRL; pip install "eyespot[preference]"') from error
    return trl.DPOTrainer, trl.DPOConfig, datasets.Dataset


def _prepared(folder: str | Path, fast_bfloat16: bool, *, learns: bool) -> tuple[VLM, Any]:
    """The model with what learns in float32, or wholly frozen."""
    model, processor = load_parts(folder)
    if not fast_bfloat16:
        model.float()  # type: ignore[no-untyped-call]
    has_adapters = "language" in (model.config.lora or {})
    if learns and not has_adapters:
        model.language.float()
    model.requires_grad_(False)
    if learns:
        model.set_trainable(language="lora" if has_adapters else "full")
    return model, processor


def _save(policy: VLM, processor: Any, result: Preference, model: Path, settings: dict[str, Any]) -> None:
    """The trained folder; its record is that of the model before, with what happened here beside it."""
    if not all(map(math.isfinite, result.losses)):
        raise ValueError(f"the loss became {result.losses[-1]}, so nothing was saved; lower lr")
    record_file = model / RECORD_FILE
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    record["preference"] = {**settings, "losses": result.losses, "margins": result.margins, "origin": origin()}
    result.folder.parent.mkdir(parents=True, exist_ok=True)
    save_whole(policy, processor, result.folder, record)
