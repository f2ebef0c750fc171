"""Ask a model every question with and without its picture; say how well it answers and whether it sees."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from eyespot.data.boxes import is_box
from eyespot.evaluation.controls import blind, image_key, majority, prompt_key, shuffled
from eyespot.evaluation.metrics import (
    Difference,
    cluster_bootstrap,
    is_right,
    normalize_answer,
    paired_bootstrap,
)
from eyespot.registry import closest

if TYPE_CHECKING:
    from eyespot.data.sample import Sample
    from eyespot.processing.images import ImageInput
    from eyespot.processing.prompt import Message

CONTROLS = ("blind", "shuffled", "majority")
# A model sees only if it beats both; majority is an oracle that need not be beaten.
PICTURE_CONTROLS = ("blind", "shuffled")
NUM_CONFUSIONS = 12
REPORT_FILE = "report.json"
PREDICTIONS_FILE = "predictions.jsonl"


class Answerer(Protocol):
    """All that evaluation knows of a model."""

    def answer_batch(
        self, conversations: Sequence[tuple[Sequence[ImageInput], Sequence[Message]]], max_new_tokens: int
    ) -> list[str]:
        """One greedy answer for each (images, messages); the messages end with a user turn."""
        ...


@dataclass(frozen=True)
class Score:
    """Share of right answers and its interval over pictures, both in [0, 1]."""

    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class TypeScore:
    """One kind of question. The last four are for yes/no questions only: shares in [0, 1] of all its questions."""

    num_questions: int
    accuracy: float
    interval: tuple[float, float]
    controls: dict[str, float]
    yes_rate: float | None = None
    neither_rate: float | None = None
    always_yes: float | None = None
    always_no: float | None = None


@dataclass(frozen=True)
class Confusion:
    """A wrong pair, normalised, and how often it came."""

    truth: str
    prediction: str
    count: int


@dataclass(frozen=True)
class Prediction:
    """What was asked and answered; a control that was not run is None."""

    id: str
    group: str
    question: str
    prediction: str
    answers: tuple[str, ...]
    correct: bool
    blind_prediction: str | None = None
    shuffled_prediction: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate``.

    accuracy and interval are those with the right picture; ``controls`` and ``differences`` (score minus control,
    paired by question) are by the control's name. ``seconds`` is the time of all answers, controls included, and
    ``questions_per_second`` the distinct inputs asked in that time, so shared answers do not flatter it.
    """

    name: str
    num_questions: int
    num_pictures: int
    accuracy: float
    interval: tuple[float, float]
    controls: dict[str, Score]
    differences: dict[str, Difference]
    verdict: str
    by_type: dict[str, TypeScore]
    confusions: tuple[Confusion, ...]
    predictions: tuple[Prediction, ...]
    seconds: float
    questions_per_second: float
    settings: dict[str, Any]

    @property
    def difference(self) -> Difference | None:
        """Score minus blind score, paired, with its interval; None if the blind control was not run."""
        return self.differences.get("blind")

    @property
    def sees(self) -> bool:
        return self.verdict.startswith("sees:")

    def to_json(self) -> str:
        """Everything but the predictions, which have a file of their own, one a line."""
        report = asdict(self)
        del report["predictions"]
        report["differences"] = {name: difference._asdict() for name, difference in self.differences.items()}
        return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: str | Path) -> Path:
        """Write report.json and predictions.jsonl, each whole or not at all; returns the path of report.json."""
        folder = Path(folder)
        lines = [json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in self.predictions]
        write_atomically(folder / PREDICTIONS_FILE, "".join(lines))
        return write_atomically(folder / REPORT_FILE, self.to_json())

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The evaluation that ``write`` put there. Raises FileNotFoundError if a file is missing."""
        report = json.loads((Path(folder) / REPORT_FILE).read_text(encoding="utf-8"))
        with (Path(folder) / PREDICTIONS_FILE).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        report["predictions"] = tuple(Prediction(**{**row, "answers": tuple(row["answers"])}) for row in rows)
        report["confusions"] = tuple(Confusion(**row) for row in report["confusions"])
        report["differences"] = {name: Difference(**row) for name, row in report["differences"].items()}
        report["controls"] = {name: Score(**_with_interval(row)) for name, row in report["controls"].items()}
        report["by_type"] = {name: TypeScore(**_with_interval(row)) for name, row in report["by_type"].items()}
        return cls(**_with_interval(report))


def evaluate(
    answerer: Answerer,
    samples: Sequence[Sample],
    *,
    name: str,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Share of right answers of a model (see ``is_right``), beside the same questions without their pictures.

    Greedy answers are a function of the input, so equal (images, messages) are asked once and the answer is shared: a
    thousand yes/no questions without pictures are a handful of inputs, and a shuffled question may be one that was
    asked already. Inputs of similar length go together, which saves padding; the results keep the order of samples.

    Args:
        answerer: the model.
        samples: what to ask; the last message of each is the answer and is not shown to the model.
        name: of this evaluation, for the report.
        batch_size: conversations handed over at once.
        max_new_tokens: limit of each answer.
        controls: any of blind, shuffled (see ``controls``) and majority, the best that a text-only guesser could do.
        seed: of the shuffled pictures and of the bootstrap.
        progress: True shows a bar on stderr, False does not, None does if stderr is a terminal.

    Raises:
        ValueError: no sample, ids that repeat, a sample without answers or without a question before its answer, an
            unknown control, a limit below 1, shuffling with one picture only, or an answerer that returns another
            number of answers than it was asked.
    """
    _check(samples, batch_size, max_new_tokens, controls)
    conditions = {"pictures": list(samples)}
    if "blind" in controls:
        conditions["blind"] = [blind(sample) for sample in samples]
    if "shuffled" in controls:
        conditions["shuffled"] = shuffled(samples, seed)
    started = time.perf_counter()
    texts, num_asked = _answers(answerer, conditions, batch_size, max_new_tokens, progress)
    seconds = time.perf_counter() - started
    if "majority" in controls:
        texts["majority"] = majority(samples)
    settings = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "controls": list(controls),
        "seed": seed,
        "num_asked": num_asked,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    return _evaluation(name, samples, texts, seconds, settings)


def write_atomically(path: str | Path, text: str) -> Path:
    """Write UTF-8 text so that a reader finds the old file or the whole new one; folders are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def question_text(sample: Sample) -> str:
    """The words of the last user turn before the answer."""
    content = sample.messages[-2]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def truth_of(answers: Sequence[str]) -> str:
    """The accepted answer given most often, normalised; the first of them on a tie."""
    return Counter(map(normalize_answer, answers)).most_common(1)[0][0]


def _check(samples: Sequence[Sample], batch_size: int, max_new_tokens: int, controls: Sequence[str]) -> None:
    for what, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{what} is {value}, the least is 1")
    for control in controls:
        if control not in CONTROLS:
            hint = closest(control, list(CONTROLS))
            raise ValueError(f"unknown control {control!r}{hint} Choices: {', '.join(CONTROLS)}")
    if not samples:
        raise ValueError("there are 0 samples, at least 1 is needed; check the split and the filters")
    repeated = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} sample ids repeat, the first is {repeated[0]!r}; give each sample its own id"
        )
    for sample in samples:
        roles = [message["role"] for message in sample.messages[-2:]]
        if roles != ["user", "assistant"]:
            raise ValueError(f"sample {sample.id!r} ends with the turns {roles}; it must end with user, assistant")
        if not sample.answers:
            raise ValueError(f"sample {sample.id!r} has 0 answers, at least 1 is needed; give one or drop it")


def _answers(
    answerer: Answerer,
    conditions: Mapping[str, Sequence[Sample]],
    batch_size: int,
    max_new_tokens: int,
    progress: bool | None,
) -> tuple[dict[str, list[str]], int]:
    """Answers by condition in the order of its samples, and the number of distinct inputs that were asked."""
    known: dict[Hashable, str] = {}
    keys = {name: [_input_key(sample) for sample in samples] for name, samples in conditions.items()}
    with _bar(progress) as bar:
        tasks = {name: bar.add_task(name, total=None, rate="") for name in conditions}
        for name, samples in conditions.items():
            new = {key: sample for key, sample in zip(keys[name], samples, strict=True) if key not in known}
            _ask(answerer, new, batch_size, max_new_tokens, known, bar, tasks[name])
    return {name: [known[key] for key in condition_keys] for name, condition_keys in keys.items()}, len(known)


def _input_key(sample: Sample) -> Hashable:
    return tuple(image_key(image) for image in sample.images), prompt_key(sample)


def _ask(
    answerer: Answerer,
    new: Mapping[Hashable, Sample],
    batch_size: int,
    max_new_tokens: int,
    known: dict[Hashable, str],
    bar: Progress,
    task: TaskID,
) -> None:
    """Add the answer to each new input to the known ones."""
    bar.update(task, total=len(new))
    started = time.perf_counter()
    keys = _in_order(new)
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        answers = answerer.answer_batch([(new[key].images, new[key].messages[:-1]) for key in batch], max_new_tokens)
        if len(answers) != len(batch):
            raise ValueError(f"answer_batch got {len(batch)} conversations and gave {len(answers)} answers; one each")
        known.update(zip(batch, answers, strict=True))
        rate = (start + len(batch)) / max(time.perf_counter() - started, 1e-9)
        bar.update(task, advance=len(batch), rate=f"{rate:.1f}/s")


def _in_order(new: Mapping[Hashable, Sample]) -> list[Hashable]:
    """Questions about one picture together, because they can share it, and the pictures with the longest ones first: a
    batch that does not fit into memory fails at once, and the time left is not underestimated."""
    pictures: dict[Hashable, list[Hashable]] = {}
    for number, (key, sample) in enumerate(new.items()):
        pictures.setdefault(tuple(map(image_key, sample.images)) or number, []).append(key)

    def length(key: Hashable) -> int:
        return len(prompt_key(new[key]))

    groups = [sorted(group, key=length, reverse=True) for group in pictures.values()]
    return [key for group in sorted(groups, key=lambda group: length(group[0]), reverse=True) for key in group]


def _bar(progress: bool | None) -> Progress:
    shown = sys.stderr.isatty() if progress is None else progress
    return Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, force_terminal=shown),
        disable=not shown,
    )


def _evaluation(
    name: str,
    samples: Sequence[Sample],
    texts: Mapping[str, Sequence[str]],
    seconds: float,
    settings: dict[str, Any],
) -> Evaluation:
    groups = [sample.group for sample in samples]
    seed = settings["seed"]
    correct = {
        condition: [is_right(text, sample.answers) for text, sample in zip(answers, samples, strict=True)]
        for condition, answers in texts.items()
    }
    scores = {condition: _score(right, groups, seed) for condition, right in correct.items()}
    whole = scores.pop("pictures")
    differences = {
        control: paired_bootstrap(correct["pictures"], correct[control], groups, seed=seed) for control in scores
    }
    return Evaluation(
        name=name,
        num_questions=len(samples),
        num_pictures=len({sample.group for sample in samples if sample.images}),
        accuracy=whole.accuracy,
        interval=whole.interval,
        controls=scores,
        differences=differences,
        verdict=_verdict(differences),
        by_type=_by_type(samples, texts["pictures"], correct, seed),
        confusions=_confusions(samples, texts["pictures"], correct["pictures"]),
        predictions=_predictions(samples, texts, correct["pictures"]),
        seconds=seconds,
        questions_per_second=settings["num_asked"] / max(seconds, 1e-9),
        settings=settings,
    )


def _score(correct: Sequence[bool], groups: Sequence[str], seed: int) -> Score:
    return Score(sum(correct) / len(correct), cluster_bootstrap(correct, groups, seed=seed))


def _verdict(differences: Mapping[str, Difference]) -> str:
    """Sees only if both picture controls are beaten: a model that is merely lost without any picture does not see."""
    tried = [control for control in PICTURE_CONTROLS if control in differences]
    if not tried:
        return "not checked: neither the blind nor the shuffled control was run"
    equalled = [control for control in tried if differences[control].low <= 0]
    control = (equalled or tried)[0]
    points, low, high = (100 * value for value in differences[control])
    word = "does not see" if equalled else "sees"
    return f"{word}: {points:+.1f} points [{low:.1f}, {high:.1f}] over {control}"


def _by_type(
    samples: Sequence[Sample], texts: Sequence[str], correct: Mapping[str, Sequence[bool]], seed: int
) -> dict[str, TypeScore]:
    """By the kind of the question, where the data say it, else by that of the answer."""
    rows: dict[str, list[int]] = {"yes/no": [], "other": []}
    for row, sample in enumerate(samples):
        kind = sample.kind or ("yes/no" if _is_yes_no(sample) else "other")
        rows.setdefault(kind, []).append(row)
    return {kind: _type_score(chosen, samples, texts, correct, seed) for kind, chosen in rows.items() if chosen}


def _is_yes_no(sample: Sample) -> bool:
    return truth_of(sample.answers) in ("yes", "no")


def _type_score(
    rows: Sequence[int],
    samples: Sequence[Sample],
    texts: Sequence[str],
    correct: Mapping[str, Sequence[bool]],
    seed: int,
) -> TypeScore:
    score = _score([correct["pictures"][row] for row in rows], [samples[row].group for row in rows], seed)
    controls = {
        name: sum(right[row] for row in rows) / len(rows) for name, right in correct.items() if name != "pictures"
    }
    if not all(_is_yes_no(samples[row]) for row in rows):
        return TypeScore(len(rows), score.accuracy, score.interval, controls)
    said = Counter(normalize_answer(texts[row]) for row in rows)
    always = {word: sum(is_right(word, samples[row].answers) for row in rows) / len(rows) for word in ("yes", "no")}
    return TypeScore(
        len(rows),
        score.accuracy,
        score.interval,
        controls,
        yes_rate=said["yes"] / len(rows),
        neither_rate=(len(rows) - said["yes"] - said["no"]) / len(rows),
        always_yes=always["yes"],
        always_no=always["no"],
    )


def _confusions(samples: Sequence[Sample], texts: Sequence[str], correct: Sequence[bool]) -> tuple[Confusion, ...]:
    """The most frequent wrong pairs, the most frequent first, then by the alphabet; no two boxes are the same."""
    pairs = Counter(
        (truth_of(sample.answers), normalize_answer(text))
        for sample, text, right in zip(samples, texts, correct, strict=True)
        if not right and not is_box(truth_of(sample.answers))
    )
    ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    return tuple(Confusion(truth, prediction, count) for (truth, prediction), count in ordered[:NUM_CONFUSIONS])


def _predictions(
    samples: Sequence[Sample], texts: Mapping[str, Sequence[str]], correct: Sequence[bool]
) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(
            id=sample.id,
            group=sample.group,
            question=question_text(sample),
            prediction=texts["pictures"][row],
            answers=tuple(sample.answers),
            correct=correct[row],
            blind_prediction=texts["blind"][row] if "blind" in texts else None,
            shuffled_prediction=texts["shuffled"][row] if "shuffled" in texts else None,
        )
        for row, sample in enumerate(samples)
    )


def _versions() -> dict[str, str]:
    versions = {"python": python_version()}
    for package in ("eyespot", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _with_interval(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; the interval becomes one again."""
    return {**row, "interval": tuple(row["interval"])}
