"""Ask a model every question with and without its picture; say how well it answers and whether it sees."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

import numpy as np

from eyespot.data.boxes import is_box
from eyespot.evaluation.asking import Answerer, Journal, Said, ask_all
from eyespot.evaluation.benchmarks.base import Benchmark, Questions, Reference, Scored, make_benchmark
from eyespot.evaluation.controls import blind, majority, shuffled
from eyespot.evaluation.metrics import Difference, cluster_bootstrap, is_right, normalize_answer, paired_bootstrap
from eyespot.evaluation.results import Calibration, Confusion, Evaluation, Prediction, Score, TypeScore
from eyespot.registry import closest

if TYPE_CHECKING:
    from eyespot.data.sample import Sample

CONTROLS = ("blind", "shuffled", "majority", "always")
# A model sees only if it beats both; majority is an oracle that need not be beaten.
PICTURE_CONTROLS = ("blind", "shuffled")
FIXED_ANSWERS = ("yes", "no")
NUM_CONFUSIONS = 12
LONGEST_CONFUSED = 40  # characters of a truth; whole captions are not confused with each other


def evaluate(
    answerer: Answerer,
    samples: Sequence[Sample],
    *,
    name: str,
    benchmark: Benchmark | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
    progress: bool | None = None,
    journal: Journal | None = None,
) -> Evaluation:
    """Score of a model on all questions, beside the same questions without their pictures.

    Greedy answers are a function of the input, so equal (images, messages) are asked once and the answer is shared: a
    thousand yes/no questions without pictures are a handful of inputs, and a shuffled question may be one that was
    asked already. Inputs of similar length go together, which saves padding; the results keep the order of samples.

    Args:
        answerer: the model.
        samples: what to ask; the last message of each is the answer and is not shown to the model.
        name: of this evaluation, for the report.
        benchmark: scores the answers; unless given one is right if it is accepted (see ``is_right``).
        batch_size: conversations handed over at once.
        max_new_tokens: limit of each answer; the benchmark's own unless given.
        controls: any of blind, shuffled (see ``controls``), majority, the best that a text-only guesser could do, and
            always, which says yes, and no, to everything if all questions are yes/no questions.
        seed: of the shuffled pictures and of the bootstrap.
        progress: True shows a bar on stderr, False does not, None does if stderr is a terminal.
        journal: keeps answers while they come in, and gives those of an evaluation that was stopped.

    Raises:
        ValueError: no sample, ids that repeat, a sample without answers or without a question before its answer, an
            unknown control, a limit below 1, shuffling with one picture only, or an answerer that returns another
            number of answers than it was asked.
    """
    benchmark = Questions() if benchmark is None else benchmark
    max_new_tokens = benchmark.max_new_tokens if max_new_tokens is None else max_new_tokens
    _check(samples, batch_size, max_new_tokens, controls)
    conditions = {"pictures": list(samples)}
    if "blind" in controls:
        conditions["blind"] = [blind(sample) for sample in samples]
    if "shuffled" in controls:
        conditions["shuffled"] = shuffled(samples, seed)
    started = time.perf_counter()
    said, num_asked = ask_all(
        answerer,
        conditions,
        by=benchmark.by,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
        journal=journal,
    )
    seconds = time.perf_counter() - started
    settings = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "controls": list(controls),
        "seed": seed,
        "by": benchmark.by,
        "source": benchmark.source,
        "num_asked": num_asked,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    if "majority" in controls:
        said["majority"] = [Said(text) for text in majority(samples)]
    predictions = _predictions(samples, said)
    num_pictures = len({sample.group for sample in samples if sample.images})
    return _evaluation(name, benchmark, predictions, num_pictures, seconds, settings)


def rescore(folder: str | Path, benchmark: Benchmark | None = None) -> Evaluation:
    """The evaluation of a folder, with scores computed anew from its predictions.jsonl; nothing is asked.

    Args:
        folder: where ``Evaluation.write`` wrote.
        benchmark: the one that the evaluation names, unless given.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the evaluation is of a benchmark that is not known here, or of another version of eyespot.
    """
    earlier = Evaluation.read(folder)
    benchmark = make_benchmark(earlier.settings["source"]) if benchmark is None else benchmark
    return _evaluation(
        earlier.name, benchmark, earlier.predictions, earlier.num_pictures, earlier.seconds, earlier.settings
    )


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


def _predictions(samples: Sequence[Sample], said: Mapping[str, Sequence[Said]]) -> list[Prediction]:
    """Not scored yet."""

    def text(condition: str, row: int) -> str | None:
        return said[condition][row].text if condition in said else None

    return [
        Prediction(
            id=sample.id,
            group=sample.group,
            kind=sample.kind or ("yes/no" if _is_yes_no(sample) else "other"),
            question=question_text(sample),
            options=tuple(sample.options),
            answers=tuple(sample.answers),
            prediction=said["pictures"][row].text,
            score=0.0,
            probability=_probability(said["pictures"][row].log_prob),
            blind_prediction=text("blind", row),
            shuffled_prediction=text("shuffled", row),
            majority_prediction=text("majority", row),
        )
        for row, sample in enumerate(samples)
    ]


def _probability(log_prob: float | None) -> float | None:
    return None if log_prob is None else min(math.exp(log_prob), 1.0)


def _evaluation(
    name: str,
    benchmark: Benchmark,
    rows: Sequence[Prediction],
    num_pictures: int,
    seconds: float,
    settings: dict[str, Any],
) -> Evaluation:
    scored = {
        condition: benchmark.score(texts, rows) for condition, texts in _texts(rows, settings["controls"]).items()
    }
    blind_scores = scored["blind"].samples if "blind" in scored else [None] * len(rows)
    rows = [
        replace(row, score=score, blind_score=blind_score)
        for row, score, blind_score in zip(rows, scored["pictures"].samples, blind_scores, strict=True)
    ]
    judge = _Judge(benchmark.limit, [row.group for row in rows], settings["seed"])
    scores = {condition: judge.score(each.samples) for condition, each in scored.items()}
    whole = scores.pop("pictures")
    differences = {control: judge.difference(scored["pictures"].samples, scored[control].samples) for control in scores}
    return Evaluation(
        name=name,
        benchmark=benchmark.source.get("benchmark", "questions"),
        measure=benchmark.measure,
        limit=benchmark.limit,
        num_questions=len(rows),
        num_pictures=num_pictures,
        accuracy=whole.accuracy,
        interval=whole.interval,
        controls=scores,
        differences=differences,
        verdict=_verdict(differences),
        figures={condition: dict(each.figures) for condition, each in scored.items() if each.figures},
        by_type=_by_type(benchmark, rows, scored, settings["seed"]),
        confusions=_confusions(rows),
        calibration=_calibration(rows, benchmark.limit),
        predictions=tuple(rows),
        seconds=seconds,
        questions_per_second=settings["num_asked"] / max(seconds, 1e-9),
        settings=settings,
    )


def _texts(rows: Sequence[Prediction], controls: Sequence[str]) -> dict[str, list[str]]:
    """What was said in every condition, and what always the same answer would be."""
    texts: dict[str, list[str]] = {"pictures": [row.prediction for row in rows]}
    for control in ("blind", "shuffled", "majority"):
        if control in controls:
            texts[control] = [getattr(row, f"{control}_prediction") for row in rows]
    if "always" in controls and all(map(_is_yes_no, rows)):
        texts |= {f"always {word}": [word] * len(rows) for word in FIXED_ANSWERS}
    return texts


class _Judge:
    """Means and intervals of scores in [0, limit] over the same questions."""

    def __init__(self, limit: float, groups: Sequence[str], seed: int) -> None:
        self.limit, self.groups, self.seed = limit, groups, seed

    def score(self, samples: Sequence[float]) -> Score:
        shares = self._shares(samples)
        low, high = cluster_bootstrap(shares, self.groups, seed=self.seed)
        return Score(float(shares.mean()) * self.limit, (low * self.limit, high * self.limit))

    def difference(self, samples: Sequence[float], control: Sequence[float]) -> Difference:
        shares = paired_bootstrap(self._shares(samples), self._shares(control), self.groups, seed=self.seed)
        return Difference(*(value * self.limit for value in shares))

    def _shares(self, samples: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.asarray(samples, dtype=np.float64) / self.limit


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
    benchmark: Benchmark, rows: Sequence[Prediction], scored: Mapping[str, Scored], seed: int
) -> dict[str, TypeScore]:
    """By the kind of the question, where the data say it, else by that of the answer."""
    places: dict[str, list[int]] = {"yes/no": [], "other": []}
    for place, row in enumerate(rows):
        places.setdefault(row.kind, []).append(place)
    return {
        kind: _type_score(benchmark, [rows[place] for place in chosen], _chosen(scored, chosen), seed)
        for kind, chosen in places.items()
        if chosen
    }


def _chosen(scored: Mapping[str, Scored], places: Sequence[int]) -> dict[str, list[float]]:
    return {condition: [each.samples[place] for place in places] for condition, each in scored.items()}


def _type_score(
    benchmark: Benchmark, rows: Sequence[Prediction], samples: Mapping[str, Sequence[float]], seed: int
) -> TypeScore:
    score = _Judge(benchmark.limit, [row.group for row in rows], seed).score(samples["pictures"])
    controls = {name: sum(values) / len(rows) for name, values in samples.items() if name != "pictures"}
    texts = [row.prediction for row in rows]
    figures = dict(benchmark.score(texts, rows).figures)
    if not all(map(_is_yes_no, rows)):
        return TypeScore(len(rows), score.accuracy, score.interval, controls, figures)
    said = Counter(map(normalize_answer, texts))
    always = {word: sum(is_right(word, row.answers) for row in rows) / len(rows) for word in FIXED_ANSWERS}
    return TypeScore(
        len(rows),
        score.accuracy,
        score.interval,
        controls,
        figures,
        yes_rate=said["yes"] / len(rows),
        neither_rate=(len(rows) - said["yes"] - said["no"]) / len(rows),
        always_yes=always["yes"],
        always_no=always["no"],
    )


def _is_yes_no(reference: Reference) -> bool:
    return truth_of(reference.answers) in FIXED_ANSWERS


def _confusions(rows: Sequence[Prediction]) -> tuple[Confusion, ...]:
    """The most frequent wrong pairs, the most frequent first, then by the alphabet; no two boxes are the same."""
    wrong = ((truth_of(row.answers), normalize_answer(row.prediction)) for row in rows if not row.correct)
    pairs = Counter(pair for pair in wrong if len(pair[0]) <= LONGEST_CONFUSED and not is_box(pair[0]))
    ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    return tuple(Confusion(truth, prediction, count) for (truth, prediction), count in ordered[:NUM_CONFUSIONS])


def _calibration(rows: Sequence[Prediction], limit: float) -> dict[str, Calibration]:
    """Of all answers that have a probability, and of those to yes/no questions, where scores are shares."""
    given = [row for row in rows if row.probability is not None]
    parts = {"all": given, "yes/no": [row for row in given if _is_yes_no(row)]}
    if parts["yes/no"] == given:
        del parts["all"]
    return {
        name: Calibration.of([row.probability or 0.0 for row in part], [row.score for row in part])
        for name, part in parts.items()
        if part and limit == 1
    }


def _versions() -> dict[str, str]:
    versions = {"python": python_version()}
    for package in ("eyespot", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
