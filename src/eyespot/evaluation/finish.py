"""The end of a run: the trained model against its controls and its untrained self, as JSON and as a page."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from eyespot import __version__
from eyespot.config import ConfigError, TrainSettings
from eyespot.data.sample import Sample
from eyespot.evaluation.asking import Journal
from eyespot.evaluation.benchmarks.base import Benchmark, load_questions, make_benchmark
from eyespot.evaluation.cards import Dependence, choose_shown
from eyespot.evaluation.report import write_page
from eyespot.evaluation.results import Evaluation
from eyespot.evaluation.runner import evaluate
from eyespot.inference import Assistant
from eyespot.models.parameters import count_parameters
from eyespot.registry import BENCHMARKS, FORMATS
from eyespot.training.run import RECORD_FILE, Run

PAGE_FILE = "report.html"
JOURNAL_FILE = "answers.jsonl"
BEFORE = "before"
Trace = Callable[[Assistant, Evaluation, Sequence[Sample], int], Mapping[str, Dependence | str]]
"""Where the answers to so many shown questions come from; see eyespot.relevance.trace_shown."""


def load_test(source: Mapping[str, Any], limit: int | None = None, seed: int = 0) -> tuple[Benchmark, list[Sample]]:
    """The benchmark of a source (see ``make_benchmark``), and its questions; with a limit, a random choice of them.

    Raises:
        ConfigError: nothing usable was found.
        ValueError: as ``make_benchmark`` and the reading of its files.
    """
    benchmark = make_benchmark(source)
    samples, report = load_questions(benchmark)
    if not samples:
        raise ConfigError(f"no usable test sample; {report.summary()}")
    if limit is not None and limit < len(samples):
        chosen = sorted(random.Random(seed).sample(range(len(samples)), limit))
        samples = [samples[i] for i in chosen]
    return benchmark, samples


class BeforeAndAfter:
    """Asks the untrained model what the page will show, and evaluates the trained one.

    Args:
        settings: of the run; its ``data.test`` is what is asked.
    """

    def __init__(self, settings: TrainSettings) -> None:
        if settings.data.test is None:
            raise ConfigError("data.test is missing; name a data set to evaluate on, or set evaluation.run=false")
        self.settings = settings
        if settings.data.test.get("benchmark") == "retrieval":
            raise ConfigError(
                "data.test is benchmark retrieval, which asks no questions; set evaluation.run=false and use eyespot "
                "evaluate MODEL benchmark=retrieval"
            )
        self.benchmark, self.samples = load_test(settings.data.test, settings.evaluation.limit)
        self.before: Evaluation | None = None

    def ask_untrained(self, assistant: Assistant) -> None:
        """Answers of the model before its first step, for the questions that the page shows (see ``choose_shown``)."""
        if self.settings.evaluation.before > 0:
            shown = self._shown()[: self.settings.evaluation.before]
            self.before = self._evaluate(assistant, shown, "before training", controls=())
            self.before.write(self._folder() / BEFORE)
        assistant.forget()

    def is_written(self) -> bool:
        """The page stands already; it is the last thing that a run writes."""
        return (self._folder() / PAGE_FILE).is_file()

    def finish(self, run: Run, command: str, trace: Trace) -> Evaluation:
        """Evaluate the trained model; write report.json, predictions.jsonl and report.html into the run's folder."""
        assert run.assistant is not None
        run.assistant.forget()
        identity = {"run": run.settings.name, "steps": run.steps, "samples": run.samples}
        journal = journal_in(run.folder, identity, self.benchmark, self.settings.evaluation.max_new_tokens)
        evaluation = self._evaluate(
            run.assistant, self.samples, run.settings.name, self.settings.evaluation.controls, journal
        )
        evaluation.write(run.folder)
        if self.before is None and (self._folder() / BEFORE).is_dir():
            self.before = Evaluation.read(self._folder() / BEFORE)
        curves: dict[str, Sequence[tuple[float, float]]] = {
            "training loss": smoothed(run.curve),
            "validation loss": run.validation,
            "loss that the right picture saves": [(look["step"], look["other"] - look["own"]) for look in run.looks],
        }
        write_page(
            run.folder / PAGE_FILE,
            evaluation,
            title=f"eyespot: {run.settings.name}",
            before=self.before,
            model_card=facts(run),
            curves={name: points for name, points in curves.items() if points},
            samples=self.samples,
            relevance=trace(run.assistant, evaluation, self.samples, self.settings.evaluation.relevance),
            warnings=[f"Step {warning['step']:,}: {warning['text']}" for warning in run.warnings],
            command=command,
        )
        journal.close()
        return evaluation

    def _folder(self) -> Path:
        return Path(self.settings.output_dir) / self.settings.name

    def _shown(self) -> list[Sample]:
        by_id = {sample.id: sample for sample in self.samples}
        return [by_id[shown.id] for shown in choose_shown(_unanswered(self.samples))]

    def _evaluate(
        self,
        assistant: Assistant,
        samples: Sequence[Sample],
        name: str,
        controls: Sequence[str],
        journal: Journal | None = None,
    ) -> Evaluation:
        settings = self.settings.evaluation
        with assistant.folded():
            return evaluate(
                assistant,
                samples,
                name=name,
                benchmark=self.benchmark,
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
                controls=controls,
                journal=journal,
            )


class _Silent:
    def answer_batch(self, conversations: Sequence[Any], max_new_tokens: int) -> list[str]:
        return ["" for _ in conversations]


def _unanswered(samples: Sequence[Sample]) -> Evaluation:
    return evaluate(_Silent(), samples, name="unanswered", controls=(), progress=False)


def smoothed(curve: Sequence[tuple[int, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most so many points of a curve, each the mean of its neighbours' values."""
    size = max(1, -(-len(curve) // most))
    pieces = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]


def facts(run: Run) -> dict[str, Any]:
    """What the page says of the model and its training."""
    assert run.assistant is not None
    rows = [asdict(row) for row in count_parameters(run.assistant.model)]
    for row in rows:
        row["memory_mb"] = round(row.pop("num_bytes") / 1e6, 1)
    model = run.settings.model
    return {
        "vision encoder": f"{model.vision.name} {model.vision.args} ({model.vision.train})",
        "connector": f"{model.connector.name} {model.connector.args} ({model.connector.train})",
        "language model": f"{model.language.name} {model.language.args} ({model.language.train})",
        "training": f"{run.steps:,} steps, {run.samples:,} samples, {run.seconds / 60:.1f} minutes",
        "samples per second": round(run.samples / run.seconds, 1) if run.seconds else 0.0,
        "parameters": rows,
    }


def source_of(model: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The questions to ask a model: ``["format=vqa", "path=questions.jsonl"]``, ``["benchmark=pope", "path=..."]``, or
    the test set of its own run.

    Raises:
        ConfigError: a word is not key=value, or nothing was given and the model's folder names no test set.
    """
    if overrides:
        pairs = [word.partition("=") for word in overrides]
        if bad := next((key for key, equals, _ in pairs if not equals), None):
            raise ConfigError(f"{bad!r} has no value; write key=value")
        source = {key: yaml.safe_load(value) for key, _, value in pairs}
        if not {"format", "benchmark"} & set(source):
            raise ConfigError(
                f"no questions were given; add benchmark=NAME with one of: {', '.join(BENCHMARKS)}; or format=NAME "
                f"with one of: {', '.join(FORMATS)}"
            )
        return source
    record = Path(model) / RECORD_FILE
    if not Path(model).exists():
        raise ConfigError(f"model folder {model!r} does not exist; give the folder that training wrote")
    test = json.loads(record.read_text())["settings"]["data"]["test"] if record.is_file() else None
    if test is None:
        raise ConfigError(
            f"{model!r} does not say what it was tested on; add benchmark=NAME or format=NAME, and its options"
        )
    return dict(test)


def journal_in(folder: Path, identity: Mapping[str, Any], benchmark: Benchmark, max_new_tokens: int | None) -> Journal:
    """The journal of an evaluation that writes into a folder.

    Args:
        identity: of the model.
    """
    number = benchmark.max_new_tokens if max_new_tokens is None else max_new_tokens
    return Journal(
        folder / JOURNAL_FILE, {"model": identity, "by": benchmark.by, "max_new_tokens": number, "eyespot": __version__}
    )


def identity_of(model: str | Path, *others: Any) -> dict[str, Any]:
    """What tells one model folder from another, without reading the weights: names, sizes and times of its files.

    Args:
        others: on which answers depend, too: type of the weights, adapter.
    """
    files = sorted(path for path in Path(model).rglob("*") if path.is_file())
    stats = [(str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr(stats).encode()).hexdigest()
    return {"model": str(model), "files": digest, "others": list(map(str, others))}
