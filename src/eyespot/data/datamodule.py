"""Data for training: an order that is a pure function of seed and position, so that a run resumes where it was."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, overload

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from eyespot.config import ConfigError
from eyespot.data.augmenter import Augmenter
from eyespot.data.collate import Collator, Window, image_key
from eyespot.data.mixture import Mixture
from eyespot.data.sample import ImageSource, Sample
from eyespot.data.streaming import SampleStore

LOOKED_AT = 2000


class Units(Dataset[list[Sample]]):
    """What is drawn at random: a sample, or up to ``size`` samples about the same pictures, which share one prefix.

    Which samples of a picture stand together is drawn anew for each epoch, a sample with several captions shows another
    one, and pictures are augmented in another way; all are functions of seed, epoch and index alone.
    """

    def __init__(self, samples: Sequence[Sample], size: int, seed: int, augmenter: Augmenter | None = None) -> None:
        self.samples, self.seed, self.augmenter = samples, seed, augmenter
        # arrays, because objects for each of many millions of samples would fill the memory of every process
        groups = group_numbers(samples) if size > 1 else np.arange(len(samples))
        lengths = np.bincount(groups)
        self._members = np.argsort(groups, kind="stable")  # group after group
        self._starts = np.append(0, np.cumsum(lengths))  # of each group among the members
        pieces = -(-lengths // size)
        self._group_of = np.repeat(np.arange(len(lengths)), pieces)  # of each piece
        self._first_piece = np.append(0, np.cumsum(pieces))  # of each group

    def _group(self, number: int) -> list[int]:
        """The samples of a group."""
        return list(map(int, self._members[self._starts[number] : self._starts[number + 1]]))

    def _piece(self, index: int) -> tuple[int, int, int]:
        """(group, first, last) in the group's order of the epoch; the pieces of a group are of equal size."""
        number = int(self._group_of[index])
        length = int(self._starts[number + 1] - self._starts[number])
        first, end = (int(self._first_piece[n]) for n in (number, number + 1))
        i, n = index - first, end - first
        return number, length * i // n, length * (i + 1) // n

    def __len__(self) -> int:
        return len(self._group_of)

    def __getitem__(self, visit: tuple[int, int]) -> list[Sample]:
        epoch, index = visit
        unit = self.plain(epoch, index)
        if self.augmenter is None:
            return unit
        return self.augmenter(unit, random.Random(f"{self.seed}-{epoch}-{index}-augment"))

    def plain(self, epoch: int, index: int) -> list[Sample]:
        """The visit without augmentation."""
        number, first, last = self._piece(index)
        order = self._group(number)
        random.Random(f"{self.seed}-{epoch}-{number}").shuffle(order)
        rng = random.Random(f"{self.seed}-{epoch}-{index}-visit")
        return [self.samples[i].visit(rng) for i in order[first:last]]

    def augmentation(self) -> list[str]:
        """What each augmentation may change, in words; of many visits some are looked at, evenly spread."""
        if self.augmenter is None:
            return []
        step = -(-len(self) // LOOKED_AT)
        return self.augmenter.summary(self.plain(0, index) for index in range(0, len(self), step))

    def sources(self) -> list[str]:
        """The source of each unit."""
        firsts = self._members[self._starts[self._group_of]]
        return [self.samples[int(i)].source for i in firsts]

    def sizes(self) -> list[int]:
        """The number of samples of each unit."""
        return [last - first for _, first, last in map(self._piece, range(len(self)))]

    def pictures(self, index: int) -> tuple[ImageSource, ...]:
        """What the samples of a unit are about; only a unit of one sample can have others than its first has."""
        return self.samples[int(self._members[self._starts[self._group_of[index]]])].images

    @property
    def mean_size(self) -> float:
        """Samples in a unit, on average."""
        return len(self.samples) / len(self)


def group_numbers(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """int64 [n], counted in order of appearance: equal for samples of one source about the same pictures."""
    if isinstance(samples, SampleStore):
        return samples.groups()
    numbers: dict[Hashable, int] = {}
    keys = ((sample.source, image_key(sample)) if sample.images else index for index, sample in enumerate(samples))
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(samples))


class Visits(Sequence[tuple[int, int]]):
    """(epoch, unit) of every visit of an epoch, from its permutation int64 [n]; made when they are asked for."""

    def __init__(self, epoch: int, order: Tensor) -> None:
        self.number, self.order = epoch, order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, position: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, position: slice) -> list[tuple[int, int]]: ...

    def __getitem__(self, position: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(position, slice):
            return [(self.number, index) for index in self.order[position].tolist()]
        return self.number, int(self.order[position])


class WindowSampler(Sampler[list[tuple[int, int]]]):
    """The units of every optimizer step, from step ``start`` on, as (epoch, index).

    Position p of the stream is the (p mod n)-th unit of a permutation drawn for epoch p // n, so a window may reach
    into the next epoch and only the very last one can be short.

    Args:
        num_units: n. epochs: how often each is seen. window: units of one step over all devices.
        seed: of the permutations. rank, world: this device and their number; each takes its slice of a window, equal to
            the others' where the window can be divided.
        mixture: what an epoch visits in place of every unit once; n is then the number of its visits.
    """

    def __init__(
        self,
        num_units: int,
        epochs: float,
        window: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        mixture: Mixture | None = None,
    ) -> None:
        self.num_units, self.window, self.seed, self.mixture = num_units, window, seed, mixture
        self.rank, self.world = rank, world
        self.num_visits = num_units if mixture is None else len(mixture)
        self.total = math.ceil(self.num_visits * epochs)
        self.start = 0

    @property
    def num_steps(self) -> int:
        return -(-self.total // self.window)

    def epoch(self, number: int) -> Sequence[tuple[int, int]]:
        """(epoch, unit) of every visit, in order."""
        if self.mixture is not None:
            return self.mixture.epoch(number)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return Visits(number, torch.randperm(self.num_units, generator=generator))

    def visited(self, num_steps: int) -> list[int]:
        """Units that the first so many steps read on any device, each once, in the order of their first visits."""
        positions = min(num_steps * self.window, self.total)
        seen: dict[int, None] = {}
        for number in range(-(-positions // self.num_visits)):
            visits = itertools.islice(self.epoch(number), positions - number * self.num_visits)
            seen.update((index, None) for _, index in visits)
            if len(seen) == self.num_units:
                break
        return list(seen)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch: int = -1
        visits_of_epoch: Sequence[tuple[int, int]] = []
        for step in range(self.start, self.num_steps):
            visits = []
            for position in range(step * self.window, min((step + 1) * self.window, self.total)):
                if position // self.num_visits != epoch:
                    epoch = position // self.num_visits
                    visits_of_epoch = self.epoch(epoch)
                visits.append(visits_of_epoch[position % self.num_visits])
            first, last = (len(visits) * rank // self.world for rank in (self.rank, self.rank + 1))
            yield visits[first:last]


class VLMDataModule(lightning.LightningDataModule):
    """Training windows and validation batches of a run.

    Args:
        train, validation: samples.
        collator: with the number of micro-batches of a step.
        batch_size: samples of a micro-batch; on average, when samples share pictures.
        share: at most so many samples about the same pictures stand together; 1 shares nothing.
        epochs, seed: see WindowSampler. world: number of devices.
        num_workers: processes that read and resize pictures.
        weights: of the sources in the training visits, see Mixture; None visits every sample once an epoch.
        augmenter: changes the training samples, never those of the validation.
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
        weights: Mapping[str, float] | None = None,
        augmenter: Augmenter | None = None,
    ) -> None:
        super().__init__()
        self.collator, self.num_workers = collator, num_workers
        self.train_units = units = Units(train, share, seed, augmenter)
        self.validation_units = Units(validation, share, seed)
        mixture = Mixture(units.sources(), units.sizes(), weights, seed) if weights else None
        self.units_per_batch = max(1, round(batch_size / (mixture or units).mean_size))
        window = self.units_per_batch * collator.accumulate * world
        self.sampler = WindowSampler(len(units), epochs, window, seed, world=world, mixture=mixture)

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
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        num_rounds = -(-len(batches) // world)
        own = [*batches[rank::world], []]  # the last one is for a round in which only others have a batch
        return self._loader(self.validation_units, own[:num_rounds], self.collator.whole())

    def state_dict(self) -> dict[str, int]:
        return {"units in the data": len(self.train_units), "units in a step": self.sampler.window}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Raises ConfigError if this run's positions in the data are not those of the one that is continued."""
        for name, now in self.state_dict().items():
            if state_dict[name] != now:
                raise ConfigError(
                    f"the interrupted run had {state_dict[name]} {name}, now there are {now}; use its data and its "
                    "trainer.devices to go on, another name=..., or --fresh to start over"
                )

    def _loader(self, units: Units, batches: Any, collator: Collator) -> DataLoader[Window]:
        return DataLoader(
            units,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=self.num_workers,
        )
