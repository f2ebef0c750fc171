"""Settings that trade time, memory and quality: each turned the other way round."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from eyespot.config import LoraSettings
from eyespot.plan.steps import Stage, Step, runs_bf16

Variation = tuple[str, Stage, bool]


def variations(stage: Stage, step: Step, fast_bfloat16: bool) -> list[Variation]:
    """(name, the stage with one thing changed, whether bfloat16 is quick) of every switch that the stage has."""
    rows: list[Variation] = []
    data, trainer = stage.settings.data, stage.settings.trainer
    encoder_learns = stage.train.get("vision") != "frozen"
    if not encoder_learns and not data.augment:
        on = step.encoding is None
        word = "features kept" if on else "encoder in every step"
        rows.append((word, _data(stage, cache_features=on, cache_gb=1e9), fast_bfloat16))
    if not stage.losses:
        word = "a row for each sample" if data.packing else "packed rows"
        rows.append((word, _data(stage, packing=not data.packing), fast_bfloat16))
    on = not trainer.gradient_checkpointing
    word = "gradient checkpointing" if on else "no gradient checkpointing"
    rows.append((word, _trainer(stage, gradient_checkpointing=on), fast_bfloat16))
    if not stage.losses:
        rows += [(word, other, fast_bfloat16) for word, other in _adapters(stage)]
    to = "fp32" if runs_bf16(trainer, fast_bfloat16) else "bf16"
    word = "float32" if to == "fp32" else "bfloat16"
    rows.append((word, _trainer(stage, precision=to), to == "bf16"))
    word, mode = ("encoder frozen", "frozen") if encoder_learns else ("encoder trained", "full")
    if mode == "full" or set(stage.train.values()) != {"frozen", stage.train["vision"]}:
        rows.append((word, _part(stage, "vision", mode), fast_bfloat16))
    return rows


def _adapters(stage: Stage) -> list[tuple[str, Stage]]:
    """Adapters in place of the whole language model, or the other way round."""
    mode = stage.train.get("language")
    if mode == "lora":
        return [("language model in full", _part(stage, "language", "full"))]
    return [("adapters (LoRA)", _part(stage, "language", "lora"))] if mode == "full" else []


def _part(stage: Stage, part: str, mode: str) -> Stage:
    """A part in another mode, in the dtype and with the adapters that it needs for it."""
    model = stage.settings.model
    settings: Any = getattr(model, part)
    changes: dict[str, Any] = {"train": mode}
    if mode == "full":
        changes |= {"dtype": "float32", "lora": None}
    elif settings.dtype == "float32":
        changes["dtype"] = "auto"
    if mode == "lora":
        changes["lora"] = settings.lora or LoraSettings(targets="all-linear")
    if mode == "full" and part == "language":
        changes["quantize"] = None
    model = replace(model, **{part: replace(settings, **changes)})
    return replace(stage, settings=replace(stage.settings, model=model), train={**stage.train, part: mode})


def _data(stage: Stage, **changes: Any) -> Stage:
    return replace(stage, settings=replace(stage.settings, data=dataclasses.replace(stage.settings.data, **changes)))


def _trainer(stage: Stage, **changes: Any) -> Stage:
    trainer = dataclasses.replace(stage.settings.trainer, **changes)
    return replace(stage, settings=replace(stage.settings, trainer=trainer))
