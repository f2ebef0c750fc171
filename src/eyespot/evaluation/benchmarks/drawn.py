"""Benchmarks whose questions come from a file or, without one, are asked about drawn scenes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from eyespot.data import sources
from eyespot.data.sample import ImageSource, Rejected, Sample
from eyespot.evaluation.benchmarks.base import Benchmark
from eyespot.evaluation.benchmarks.tables import questions_of


class FileOrScenes(Benchmark):
    """Questions made of the rows of a file, or about scenes of the split "test", which no training shows.

    Attributes:
        kinds: of the questions about scenes (see ``data.scenes.questions``).
        slot: stands in a prompt for the words of a row.
        prompt: the question made of them.

    Args:
        path: file of rows, or a name on the Hub; drawn scenes unless given.
        image_folder: of the pictures; the folder of the file unless given.
        split: of a data set on the Hub.
        prompt: with the slot in it; the benchmark's own unless given.
        num_scenes, image_size, objects: of drawn scenes (see ``read_scenes``).

    Raises:
        ValueError: a prompt without the slot, or an option that has no effect.
    """

    kinds: tuple[str, ...]
    slot: str
    prompt: str

    def __init__(
        self,
        path: str | None = None,
        image_folder: str | None = None,
        split: str | None = None,
        prompt: str | None = None,
        num_scenes: int | None = None,
        image_size: int | None = None,
        objects: str | int | list[str] | None = None,
    ) -> None:
        self.path, self.image_folder, self.split = path, image_folder, split
        scenes = {"num_scenes": num_scenes, "image_size": image_size, "objects": objects}
        self.scenes = {name: value for name, value in scenes.items() if value is not None}
        if path is None:
            _check_idle("without path, where scenes are drawn", image_folder=image_folder, split=split, prompt=prompt)
        else:
            _check_idle(f"beside path={path!r}", **self.scenes)
        self.prompt = self.prompt if prompt is None else prompt
        if self.slot not in self.prompt:
            raise ValueError(f"prompt is {prompt!r}; put {self.slot} where the words of a row belong")

    def read(self) -> Iterator[Sample | Rejected]:
        if self.path is None:
            return sources.records("scenes", {"split": "test", "questions": list(self.kinds), **self.scenes})
        return questions_of(self.path, self.image_folder, self.split, self.samples)

    @abstractmethod
    def samples(self, id: str, row: dict[str, Any], image: ImageSource, group: str) -> Iterable[Sample]:
        """The questions of a row; raises BadRecord."""


def _check_idle(there: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} has no effect {there}; drop it")
