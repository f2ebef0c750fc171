"""Checkpoints of a run: what changed, the hash of what did not, and everything that an exact resume needs.

A checkpoint folder holds config.json and the processor (as in any transformers folder), ``trained.safetensors`` (only
the trainable tensors), ``checkpoint.json`` (how the frozen parts are built, and their content hash) and ``resume.ckpt``
(optimizer, schedule, counters, random state). ``eyespot.load`` reads it like a whole model.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eyespot.compose import CHECKPOINT_FILE, EARLIER_FILE, TRAINED_FILE, frozen_hash, trained_tensors
from eyespot.config import ModelSettings, to_dict
from eyespot.models.vlm import VLM

RESUME_FILE = "resume.ckpt"


def random_state() -> dict[str, Any]:
    """The state of every random generator that training draws from, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of ``random_state``."""
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class CheckpointWriter:
    """Writes checkpoint folders under ``folder``; each appears whole or not at all.

    Args:
        folder: of the run's checkpoints.
        model: the model in training. settings: how its parts were built, and seed: of what is random in them.
        processor_folder: where the run saved its processor once; its files are linked, not copied.
        train: of a stage, the mode of every part, which may be another one than in the settings.
        earlier: of a stage, the file with the tensors of the stages before it; it is linked too.
    """

    def __init__(
        self,
        folder: Path,
        model: VLM,
        settings: ModelSettings,
        seed: int,
        processor_folder: Path,
        train: Mapping[str, str] | None = None,
        earlier: Path | None = None,
    ) -> None:
        self.folder, self.model, self.processor_folder, self.earlier = folder, model, processor_folder, earlier
        self.record = {"model": to_dict(settings), "seed": seed, "frozen_sha256": frozen_hash(model)}
        if train is not None:
            self.record["train"] = dict(train)

    def write(self, step: int, trainer: Any) -> Path:
        """Write the checkpoint of a step; returns its folder. Every process takes part, the first one writes."""
        target = self.folder / f"step-{step:07d}"
        partial = self.folder / f".partial-{step:07d}"
        tensors = trained_tensors(self.model)
        if trainer.is_global_zero:
            self._write_files(partial, step, tensors)
        trainer.save_checkpoint(partial / RESUME_FILE, weights_only=False)
        if trainer.is_global_zero:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        return target

    def _write_files(self, folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        for file in (path for path in self.processor_folder.rglob("*") if path.is_file()):
            link_or_copy(file, folder / file.relative_to(self.processor_folder))
        if self.earlier is not None:
            link_or_copy(self.earlier, folder / EARLIER_FILE)
        save_file(tensors, folder / TRAINED_FILE)
        (folder / CHECKPOINT_FILE).write_text(json.dumps({**self.record, "step": step}, indent=2))

    def steps(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / RESUME_FILE).is_file())

    def keep_only(self, wanted: set[Path]) -> None:
        """Delete every other checkpoint, and what an interrupted write left behind."""
        for path in [*self.folder.glob("step-*"), *self.folder.glob(".partial-*")]:
            if path not in wanted:
                shutil.rmtree(path)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
