"""The end of a run: the trained model against its controls and its untrained self, as JSON and as a page."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eyespot.config import ConfigError, TrainSettings
from eyespot.data import sources
from eyespot.data.sample import Sample
from eyespot.evaluation.report import choose_shown, write_page
from eyespot.evaluation.runner import Evaluation, evaluate
from eyespot.inference import Assistant
from eyespot.models.parameters import count_parameters
from eyespot.registry import FORMATS
from eyespot.training.run import RECORD_FILE, Run

PAGE_FILE = "report.html"


def load_test(source: dict[str, Any], limit: int | None = None, seed: int = 0) -> list[Sample]:
    """The samples of a data source ``{"format": ..., **arguments}``; with a limit, a random choice of them.

    Raises:
        ConfigError: nothing usable was found, or a sample has no reference answer.
    """
    options = {key: value for key, value in source.items() if key != "format"}
    samples, report = sources.load(source["format"], **options)
    if not samples:
        raise ConfigError(f"no usable test sample; {report.summary()}")
    if limit is not None and limit < len(samples):
        chosen = sorted(random.Random(seed).sample(range(len(samples)), limit))
        samples = [samples[i] for i in chosen]
    return samples


class BeforeAndAfter:
    """Asks the untrained model what the page will show, and evaluates the trained one.

    Args:
        settings: of the run; its ``data.test`` is what is asked.
    """

    def __init__(self, settings: TrainSettings) -> None:
        if settings.data.test is None:
            raise ConfigError("data.test is missing; name a data set to evaluate on, or set evaluation.run=false")
        self.settings = settings
        self.samples = load_test(settings.data.test, settings.evaluation.limit)
        self.before: Evaluation | None = None

    def ask_untrained(self, assistant: Assistant) -> None:
        """Answers of the model before its first step, for the questions that the page shows (see ``choose_shown``)."""
        if self.settings.evaluation.before > 0:
            shown = self._shown()[: self.settings.evaluation.before]
            self.before = self._evaluate(assistant, shown, "before training", controls=())
            self.before.write(self._folder() / "before")
        assistant.forget()

    def is_written(self) -> bool:
        """The page stands already; it is the last thing that a run writes."""
        return (self._folder() / PAGE_FILE).is_file()

    def finish(self, run: Run, command: str) -> Evaluation:
        """Evaluate the trained model; write report.json, predictions.jsonl and report.html into the run's folder."""
        assert run.assistant is not None
        run.assistant.forget()
        evaluation = self._evaluate(run.assistant, self.samples, run.settings.name, self.settings.evaluation.controls)
        evaluation.write(run.folder)
        if self.before is None and (self._folder() / "before").is_dir():
            self.before = Evaluation.read(self._folder() / "before")
        curves: dict[str, Sequence[tuple[float, float]]] = {
            "training loss": smoothed(run.curve),
            "validation loss": run.validation,
        }
        write_page(
            run.folder / PAGE_FILE,
            evaluation,
            title=f"eyespot: {run.settings.name}",
            before=self.before,
            model_card=facts(run),
            curves={name: points for name, points in curves.items() if points},
            samples=self.samples,
            command=command,
        )
        return evaluation

    def _folder(self) -> Path:
        return Path(self.settings.output_dir) / self.settings.name

    def _shown(self) -> list[Sample]:
        by_id = {sample.id: sample for sample in self.samples}
        return [by_id[shown.id] for shown in choose_shown(_unanswered(self.samples))]

    def _evaluate(
        self, assistant: Assistant, samples: Sequence[Sample], name: str, controls: Sequence[str]
    ) -> Evaluation:
        settings = self.settings.evaluation
        with assistant.folded():
            return evaluate(
                assistant,
                samples,
                name=name,
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
                controls=controls,
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
    """The data to evaluate a model on: ``["format=vqa", "path=questions.jsonl"]``, or the test set of its own run.

    Raises:
        ConfigError: a word is not key=value, or nothing was given and the model's folder names no test set.
    """
    if overrides:
        pairs = [word.partition("=") for word in overrides]
        if bad := next((key for key, equals, _ in pairs if not equals), None):
            raise ConfigError(f"{bad!r} has no value; write key=value")
        source = {key: value for key, _, value in pairs}
        if "format" not in source:
            raise ConfigError(f"no format was given; add format=NAME with one of: {', '.join(FORMATS.names())}")
        return source
    record = Path(model) / RECORD_FILE
    if not Path(model).exists():
        raise ConfigError(f"model folder {model!r} does not exist; give the folder that training wrote")
    test = json.loads(record.read_text())["settings"]["data"]["test"] if record.is_file() else None
    if test is None:
        raise ConfigError(f"{model!r} does not say what it was tested on; add format=NAME and its options")
    return dict(test)
