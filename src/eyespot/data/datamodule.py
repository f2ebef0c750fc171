"""Data for training: an order that is a pure function of seed and position, so that a run resumes where it was."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from eyespot.data.collate import Collator, Window, image_key
from eyespot.data.sample import ImageSource, Sample


class Units(Dataset[list[Sample]]):
    """What is drawn at random: a sample, or up to ``size`` samples about the same pictures, which share one prefix.

    Which samples of a picture stand together is drawn anew for each epoch, and a sample with several captions shows
    another one; both are functions of seed, epoch and index alone.
    """

    def __init__(self, samples: Sequence[Sample], size: int, seed: int) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault(image_key(sample) if size > 1 and sample.images else index, []).append(index)
        self.samples, self.seed = samples, seed
        self.groups = list(groups.values())
        # (group, first, last) in the group's order of the epoch; the pieces of a group are of equal size
        self.pieces = [
            (g, len(group) * i // n, len(group) * (i + 1) // n)
            for g, group in enumerate(self.groups)
            for n in [-(-len(group) // size)]
            for i in range(n)
        ]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, visit: tuple[int, int]) -> list[Sample]:
        epoch, index = visit
        number, first, last = self.pieces[index]
        order = list(self.groups[number])
        random.Random(f"{self.seed}-{epoch}-{number}").shuffle(order)
        rng = random.Random(f"{self.seed}-{epoch}-{index}-visit")
        return [self.samples[i].visit(rng) for i in order[first:last]]

    def pictures(self, index: int) -> tuple[ImageSource, ...]:
        """What the samples of a unit are about; only a unit of one sample can have others than its first has."""
        return self.samples[self.groups[self.pieces[index][0]][0]].images

    @property
    def mean_size(self) -> float:
        """Samples in a unit, on average."""
        return len(self.samples) / len(self.pieces)


class WindowSampler(Sampler[list[tuple[int, int]]]):
    """The units of every optimizer step, from step ``start`` on, as (epoch, index).

    Position p of the stream is the (p mod n)-th unit of a permutation drawn for epoch p // n, so a window may reach
    into the next epoch and only the very last one can be short.

    Args:
        num_units: n. epochs: how often each is seen. window: units of one step over all devices.
        seed: of the permutations. rank, world: this device and their number; each takes an equal slice of a window.
    """

    def __init__(self, num_units: int, epochs: float, window: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.num_units, self.window, self.seed = num_units, window, seed
        self.rank, self.world = rank, world
        self.total = math.ceil(num_units * epochs)
        self.start = 0

    @property
    def num_steps(self) -> int:
        whole, rest = divmod(self.total, self.window)
        return whole + (rest >= self.world)

    def permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_units, generator=generator).tolist()

    def visited(self, num_steps: int) -> list[int]:
        """Units that the first so many steps read on any device, each once, in the order of the first epoch."""
        positions = min(num_steps * self.window, self.total)
        return self.permutation(0)[:positions]

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, list[int]()
        for step in range(self.start, self.num_steps):
            visits = []
            for position in range(step * self.window, min((step + 1) * self.window, self.total)):
                if position // self.num_units != epoch:
                    epoch = position // self.num_units
                    order = self.permutation(epoch)
                visits.append((epoch, order[position % self.num_units]))
            share = len(visits) // self.world
            yield visits[self.rank * share : (self.rank + 1) * share]


class VLMDataModule(lightning.LightningDataModule):
    """Training windows and validation batches of a run.

    Args:
        train, validation: samples.
        collator: with the number of micro-batches of a step.
        batch_size: samples of a micro-batch; on average, when samples share pictures.
        share: at most so many samples about the same pictures stand together; 1 shares nothing.
        epochs, seed: see WindowSampler. world: number of devices.
        num_workers: processes that read and resize pictures.
    """

    def __init__(
        self,
        train: Sequence[Sample],
        validation: Sequence[Sample],
        collator: Collator,
        *,
        batch_size: int = 32,
        share: int = 1,
        epochs: float = 1.0,
        seed: int = 42,
        num_workers: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__()
        self.collator, self.num_workers = collator, num_workers
        self.train_units = Units(train, share, seed)
        self.validation_units = Units(validation, share, seed)
        self.units_per_batch = max(1, round(batch_size / self.train_units.mean_size))
        window = self.units_per_batch * collator.accumulate * world
        self.sampler = WindowSampler(len(self.train_units), epochs, window, seed, world=world)

    def pictures(self, num_steps: int) -> Iterator[ImageSource]:
        """Those that so many steps and the validation read; one may come several times."""
        for index in self.sampler.visited(num_steps):
            yield from self.train_units.pictures(index)
        for index in range(len(self.validation_units)):
            yield from self.validation_units.pictures(index)

    def train_dataloader(self) -> DataLoader[Window]:
        """One Window for each optimizer step, starting at the step that the trainer has reached."""
        if self.trainer is not None:
            self.sampler.start = self.trainer.global_step
            self.sampler.rank, self.sampler.world = self.trainer.global_rank, self.trainer.world_size
        return self._loader(self.train_units, self.sampler, self.collator)

    def val_dataloader(self) -> DataLoader[Window]:
        """Windows of one micro-batch each, in a fixed order."""
        visits = [(0, index) for index in range(len(self.validation_units))]
        size = self.units_per_batch
        batches = [visits[start : start + size] for start in range(0, len(visits), size)]
        return self._loader(self.validation_units, batches, self.collator.whole())

    def _loader(self, units: Units, batches: Any, collator: Collator) -> DataLoader[Window]:
        return DataLoader(
            units,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=self.num_workers,
        )
