"""What a benchmark is: questions from a source, how the model is asked, and how its answers are scored."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from eyespot.data import sources
from eyespot.data.sample import LoadReport, Rejected, Sample
from eyespot.evaluation.metrics import is_right
from eyespot.registry import BENCHMARKS, closest

By = Literal["text", "option", "letter"]


class Reference(Protocol):
    """What scoring needs to know of a question; a ``Sample`` has it, and so has a line of predictions.jsonl."""

    @property
    def answers(self) -> tuple[str, ...]: ...
    @property
    def options(self) -> tuple[str, ...]: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Scored:
    """The score of every answer, from 0 to the benchmark's ``limit``, whose mean is the result, and further figures of
    all answers together, each by its name."""

    samples: Sequence[float]
    figures: dict[str, float] = field(default_factory=dict)


class Benchmark(ABC):
    """Options of the source are arguments of the constructor.

    Attributes:
        source: the options, with the name.
        measure: what a score is called. limit: the best score that an answer can have; accuracies have 1.
        by: how the model is asked: it says a text, or the likeliest of the question's options is taken, by the
            words of the option or by its letter.
        max_new_tokens: of an answer.
    """

    source: Mapping[str, Any] = {}
    measure = "accuracy"
    limit = 1.0
    by: By = "text"
    max_new_tokens = 16

    @abstractmethod
    def read(self) -> Iterator[Sample | Rejected]:
        """All questions, and what is wrong with records that are none."""

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """Of one answer for each question; at least one."""
        return Scored([float(is_right(text, each.answers)) for text, each in zip(texts, references, strict=True)])


class Questions(Benchmark):
    """The questions of a data format; an answer is right if it is accepted (see ``is_right``).

    Args:
        format: name of a data format; None if the questions are in memory already.
        options: of its reader.
    """

    def __init__(self, format: str | None = None, **options: Any) -> None:
        self.format, self.options = format, options

    def read(self) -> Iterator[Sample | Rejected]:
        yield from sources.records(self.format, self.options) if self.format is not None else ()


def make_benchmark(source: Mapping[str, Any]) -> Benchmark:
    """``{"benchmark": name, **options}``, or ``{"format": name, **options}`` for the questions of a data format.

    Raises:
        ValueError: an unknown benchmark, or options that it does not have or lacks.
    """
    options = dict(source)
    name = options.pop("benchmark", None)
    benchmark = Questions(**options) if name is None else _with_options(name, options)
    benchmark.source = dict(source)
    return benchmark


def _with_options(name: str, options: dict[str, Any]) -> Benchmark:
    kind = BENCHMARKS[name]
    parameters = inspect.signature(kind).parameters
    for option in options:
        if option not in parameters:
            choices = ", ".join(parameters)
            raise ValueError(
                f"benchmark {name!r} has no option {option!r}{closest(option, list(parameters))} (choices: {choices})"
            )
    missing = [key for key, value in parameters.items() if value.default is value.empty and key not in options]
    if missing:
        raise ValueError(f"benchmark {name!r} needs {', '.join(missing)}; add {missing[0]}=...")
    benchmark: Benchmark = kind(**options)
    return benchmark


def load_questions(benchmark: Benchmark, limit: int | None = None) -> tuple[list[Sample], LoadReport]:
    """All questions of a benchmark, or so many, and what became of every record that was read."""
    return sources.load_records(benchmark.read(), "reading questions", limit)
