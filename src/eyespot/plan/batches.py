"""What the steps of a run will read: batches of its own data without their pictures, or of assumed lengths."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from eyespot.config import PAIR_KINDS, ConfigError, DataSettings, TrainSettings, sources_of
from eyespot.data import mixture
from eyespot.data.datamodule import VLMDataModule
from eyespot.data.packing import fill_rows, pack, share_prefixes
from eyespot.data.sample import ImageSource, Sample
from eyespot.plan.skeleton import Skeleton
from eyespot.processing.processor import IGNORE_INDEX, Encoded
from eyespot.training.run import load_data, make_augmenter, make_collator

LOOKED_AT = 12  # steps whose micro-batches are looked at
LOADED = 16  # units of samples whose loading is timed
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Assumed:
    """Data that is not on this machine: samples in all, tokens of text beside the picture, those that are learned, and
    different pictures (by default one for each sample)."""

    samples: int
    text: int
    learned: int
    pictures: int | None = None


# what the recipes name. Numbers of samples and pictures: the pages of the data sets; tokens: assumed
PUBLISHED_DATA = {
    "llava_instruct_150k.json": Assumed(157_712, 200, 150, 81_000),
    "llava_v1_5_mix665k.json": Assumed(665_298, 220, 120),
    "blip_laion_cc_sbu_558k.json": Assumed(558_128, 30, 15),
    "jxie/flickr8k": Assumed(6_000, 15, 12),
}


@dataclass(frozen=True)
class MicroBatch:
    """tensors: with image_features [N, 0] in place of pictures. samples: in it."""

    tensors: Batch
    samples: int

    @property
    def cells(self) -> int:
        """Places of its rows, padding too; pictures where there are no rows."""
        rows = sum(self.tensors[name].numel() for name in ("input_ids", "text_ids") if name in self.tensors)
        return rows or len(self.tensors["image_features"])


@dataclass(frozen=True)
class Workload:
    """What a run reads on one device.

    batches: some micro-batches. num_steps: of the run. num_samples: that all its steps visit. num_pictures: different
    ones among them and in the validation. is_read: whether the batches are of the run's own data.
    """

    batches: list[MicroBatch]
    num_steps: int
    num_samples: float
    num_pictures: int
    is_read: bool

    @property
    def samples(self) -> float:
        """Of a micro-batch, on average."""
        return sum(batch.samples for batch in self.batches) / len(self.batches)

    @property
    def typical(self) -> MicroBatch:
        """The micro-batch whose size is closest to the mean."""
        mean = sum(batch.cells for batch in self.batches) / len(self.batches)
        return min(self.batches, key=lambda batch: abs(batch.cells - mean))

    @property
    def widest(self) -> MicroBatch:
        return max(self.batches, key=lambda batch: batch.cells)


class NoPictures:
    """In place of a feature store: every picture is there, and nothing of it."""

    def __getitem__(self, picture: ImageSource) -> Tensor:
        return torch.empty(0)


class Reader:
    """Samples of data settings, read once."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Sequence[Sample], Sequence[Sample]] | None] = {}

    def samples(self, settings: DataSettings, seed: int) -> tuple[Sequence[Sample], Sequence[Sample]] | None:
        """Training and validation samples; None if they are not on this disk."""
        key = f"{settings.train} {settings.validation} {settings.filters} {settings.limit} {seed} {settings.streaming}"
        key += f" {settings.validation_share}"
        if key not in self._read:
            there = all(map(is_here, sources_of(settings.train).values()))
            self._read[key] = load_data(settings, seed)[:2] if there else None
        return self._read[key]


def is_here(source: Mapping[str, Any]) -> bool:
    """Whether a source needs no download."""
    return "path" not in source or Path(source["path"]).exists()


def workload(
    settings: TrainSettings, kind: str, parts: Skeleton, reader: Reader, assumed: Assumed | None = None
) -> Workload:
    """What a run, or a stage of a kind as a run of its own, will read.

    Args:
        assumed: in place of the run's own data.

    Raises:
        ConfigError: the data is not on this disk, it is none of the published ones, and nothing is assumed.
    """
    own = None if assumed else reader.samples(settings.data, settings.trainer.seed)
    if own is not None and parts.processor is not None:
        return _read(settings, kind, parts.processor, *own)
    return _assumed(settings, kind, parts, assumed or published(settings.data))


def published(settings: DataSettings) -> Assumed:
    """What is known about data that is not here.

    Raises:
        ConfigError: nothing.
    """
    found = []
    for source in sources_of(settings.train).values():
        path = str(source.get("path"))
        known = PUBLISHED_DATA.get(path) or PUBLISHED_DATA.get(Path(path).name)
        if known is None:
            raise ConfigError(
                f"data.train.path {path!r} is not on this disk, or its tokenizer is not, and it is none of "
                f"{', '.join(PUBLISHED_DATA)}; say what to assume with --assume SAMPLES TEXT LEARNED"
            )
        found.append(known)
    samples = sum(known.samples for known in found)
    limit = min(samples, settings.limit or samples)
    pictures = sum(known.pictures or known.samples for known in found)
    text, learned = (round(sum(getattr(k, name) * k.samples for k in found) / samples) for name in ("text", "learned"))
    return Assumed(limit, text, learned, round(pictures * limit / samples))


def _read(
    settings: TrainSettings, kind: str, processor: Any, train: Sequence[Sample], validation: Sequence[Sample]
) -> Workload:
    data = _datamodule(settings, kind, processor, train, validation)
    steps = min(data.sampler.num_steps, settings.trainer.max_steps or data.sampler.num_steps)
    data.collator.features = NoPictures()  # type: ignore[assignment]
    collate, batches = data.collator.whole(), []
    for visits in itertools.islice(data.sampler, min(LOOKED_AT, steps)):
        units = [data.train_units[place] for place in visits]
        share = max(1, -(-len(units) // settings.trainer.accumulate))  # a process may have nothing left
        windows = [collate(units[start : start + share]) for start in range(0, len(units), share)]
        batches += [MicroBatch(window.batches[0], len(window.ids)) for window in windows if window.batches]
    if not batches:
        raise ConfigError("the first batches hold no usable sample; look at them with `eyespot inspect data`")
    pictures = len({id(p) if isinstance(p, PIL.Image.Image) else p for p in data.pictures(steps)})
    unit = data.train_units.mean_size
    visited = min(steps * data.sampler.window, data.sampler.total) * unit
    return Workload(batches, steps, visited, pictures, True)


def _datamodule(
    settings: TrainSettings, kind: str, processor: Any, train: Sequence[Sample], validation: Sequence[Sample]
) -> VLMDataModule:
    """As ``eyespot.training.run`` makes it."""
    data, trainer = settings.data, settings.trainer
    return VLMDataModule(
        train,
        validation[: trainer.validation_limit],
        make_collator(data, trainer.accumulate, processor, kind),
        batch_size=trainer.batch_size,
        share=data.share if data.packing and kind not in (*PAIR_KINDS, "detect") else 1,
        epochs=trainer.epochs,
        seed=trainer.seed,
        world=trainer.devices * trainer.num_nodes,
        weights=mixture.weights_of(data.train),
        augmenter=make_augmenter(data),
    )


def loading_seconds(settings: TrainSettings, kind: str, parts: Skeleton, reader: Reader, *, opens: bool) -> float:
    """For a sample, with its picture opened or without, by doing it; 0 where the data is not here."""
    own = reader.samples(settings.data, settings.trainer.seed)
    if own is None or parts.processor is None:
        return 0.0
    data = _datamodule(settings, kind, parts.processor, *own)
    collate = data.collator.whole()
    collate.features = None if opens else NoPictures()  # type: ignore[assignment]
    units = [data.train_units[visit] for visit in next(iter(data.sampler))[:LOADED]]
    collate(units[:1])  # the first one also imports
    start = time.perf_counter()
    window = collate(units)
    return (time.perf_counter() - start) / max(1, len(window.ids))


# --- assumed -----------------------------------------------------------------------------------------------------


def _assumed(settings: TrainSettings, kind: str, parts: Skeleton, assumed: Assumed) -> Workload:
    trainer = settings.trainer
    held_out = 0.0 if settings.data.validation is not None else settings.data.validation_share
    visits = assumed.samples * (1 - held_out) * trainer.epochs
    step = trainer.batch_size * trainer.accumulate * trainer.devices * trainer.num_nodes
    steps = min(-(-int(visits) // step), trainer.max_steps or int(visits))
    batch = assumed_batch(settings.data, kind, parts, assumed, trainer.batch_size)
    pictures = min(assumed.pictures or assumed.samples, int(visits))
    micro = MicroBatch(batch, trainer.batch_size)
    return Workload([micro], steps, min(visits, steps * step), pictures, False)


def assumed_batch(data: DataSettings, kind: str, parts: Skeleton, assumed: Assumed, size: int) -> Batch:
    """So many samples of one picture and as many words each.

    Raises:
        ConfigError: a stage looks for objects, about which nothing is assumed.
    """
    if kind == "detect":
        raise ConfigError("a stage of kind detect looks for objects, of which nothing can be assumed; its data must be "
                          "on this disk")  # fmt: skip
    config = parts.model.config
    picture = torch.empty(size, 0)
    if kind in PAIR_KINDS:
        return _assumed_pairs(parts, assumed, size) | {"image_features": picture}
    text = max(2, min(assumed.text, (data.max_length or 10**9) - config.num_image_tokens))
    learned = min(assumed.learned, text - 1)
    ids = [config.image_token_id] * config.num_image_tokens + [1] * text
    labels = [IGNORE_INDEX] * (len(ids) - learned) + [1] * learned
    encoded = Encoded(ids, labels, 1)
    if not data.packing:
        rows = {"input_ids": [ids] * size, "labels": [labels] * size, "attention_mask": [[1] * len(ids)] * size}
        return {name: torch.tensor(values) for name, values in rows.items()} | {"image_features": picture}
    documents = share_prefixes([(encoded, [None], i) for i in range(size)], config.image_token_id, data.row_length)
    columns, _ = pack(fill_rows(documents, data.row_length), 0)
    return columns | {"image_features": picture}


def _assumed_pairs(parts: Skeleton, assumed: Assumed, size: int) -> Batch:
    config = parts.model.config
    length = min(assumed.text + 2, (config.connector or {}).get("max_text", 32))
    words, numbers = torch.ones(size, length, dtype=torch.long), torch.arange(size)
    batch = {"text_ids": words, "text_mask": words.clone(), "image_keys": numbers, "text_keys": numbers.clone()}
    if getattr(parts.model.connector, "text", None) is None:
        picture = torch.full((size, config.num_image_tokens), config.image_token_id)
        ids = torch.cat([picture, words], dim=1)
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["labels"][:, : config.num_image_tokens + 1] = IGNORE_INDEX
    return batch


__all__ = ["Assumed", "MicroBatch", "Reader", "Workload", "assumed_batch", "loading_seconds", "workload"]
