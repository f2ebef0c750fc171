"""One page that shows what a model sees: a single HTML file without scripts and without anything from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyespot.data.boxes import is_box
from eyespot.evaluation import charts
from eyespot.evaluation.cards import (
    NUM_CARDS,
    THUMBNAILS_BYTES,
    Cards,
    Dependence,
    choose_errors,
    choose_shown,
    thumbnails,
)
from eyespot.evaluation.charts import Bar, Scale, percent, table
from eyespot.evaluation.metrics import normalize_answer
from eyespot.evaluation.page import fact, section, soft, whole_page
from eyespot.evaluation.results import Evaluation, Prediction, write_atomically
from eyespot.evaluation.runner import truth_of

if TYPE_CHECKING:
    from eyespot.data.sample import Sample

MATRIX_SIZE, FEWEST_TRUTHS = 8, 3
LONGEST_LABEL, MOST_WORDS = 20, 3  # of a truth in the matrix
OTHERS = "(another)"

CONTROL_LABELS = {
    "pictures": "With the picture",
    "shuffled": "Another picture (shuffled)",
    "blind": "No picture (blind)",
    "majority": "Best guess from words (oracle)",
    "always yes": "Always yes",
    "always no": "Always no",
    "before": "Before training",
}
CONTROL_HEADS = {**CONTROL_LABELS, "shuffled": "Shuffled", "blind": "Blind", "majority": "Words only (oracle)"}
FIGURE_LABELS = {"f1": "F1", "yes_rate": "share of yes"}


def write_page(
    path: str | Path,
    evaluation: Evaluation,
    *,
    title: str,
    before: Evaluation | None = None,
    model_card: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    samples: Sequence[Sample] | None = None,
    relevance: Mapping[str, Dependence | str] | None = None,
    warnings: Sequence[str] = (),
    command: str | None = None,
) -> Path:
    """Write the page as one HTML file, whole or not at all.

    Args:
        path: of the file.
        evaluation: what the page shows.
        title: its heading.
        before: the same questions answered by the model before training.
        model_card: plain facts. A single value becomes a line; a mapping, or a list of mappings with the same keys,
            becomes a table of its own, such as ``{"parameters": [{"part": "connector", "parameters": 590_000}]}``.
        curves: name -> (step, value) points, each name a chart.
        samples: of the evaluation, for the pictures; without them the cards have words only.
        relevance: id of a question -> where its answer comes from, or why that cannot be said.
        warnings: of the training, shown beside the verdict.
        command: that makes this result again.

    Returns:
        The path.

    Raises:
        ValueError: before answers none of the evaluation's questions, samples lack a shown question, relevance is of
            other questions, a curve is empty or holds a value that is not finite.
        ImageError: a picture cannot be opened (a ValueError).
        OSError: the page cannot be written.
    """
    earlier, relevance = _earlier(evaluation, before), relevance or {}
    shown, errors = choose_shown(evaluation), choose_errors(evaluation, earlier)
    budget = THUMBNAILS_BYTES // max(1, len(shown) + len(errors) + 2 * len(relevance))
    cards = Cards(Scale(evaluation.limit), earlier, thumbnails([*shown, *errors], samples, budget))
    sections = [
        _headline(evaluation, before, title),
        _warnings_section(warnings),
        _cards_section("What it answers", _shown_words(evaluation), cards.answers(shown)),
        _errors_section(evaluation, before is not None, cards, errors),
        _relevance_section(evaluation, relevance, cards, budget),
        _types_section(evaluation),
        _figures_section(evaluation),
        _calibration_section(evaluation),
        _confusions_section(evaluation),
        _curves_section(curves or {}),
        _model_section(model_card or {}),
        _reproduce_section(evaluation, command),
    ]
    return write_atomically(path, whole_page(title, "\n".join(part for part in sections if part)))


def _earlier(evaluation: Evaluation, before: Evaluation | None) -> dict[str, Prediction]:
    """Predictions before training by sample id; empty without an evaluation before."""
    if before is None:
        return {}
    earlier = {prediction.id: prediction for prediction in before.predictions}
    if not any(prediction.id in earlier for prediction in evaluation.predictions):
        raise ValueError(f"before ({before.name!r}) has 0 questions of {evaluation.name!r}; evaluate the same samples")
    return earlier


# --- the score ---------------------------------------------------------------------------------------------------


def _headline(evaluation: Evaluation, before: Evaluation | None, title: str) -> str:
    scale = Scale(evaluation.limit)
    return (
        f"<header><h1>{escape(title)}</h1>"
        + soft(
            f"{evaluation.name}: {evaluation.num_questions:,} questions about {evaluation.num_pictures:,} pictures, "
            f"scored by {_scoring(evaluation)}"
        )
        + '</header><div class="headline"><div>'
        f'<div class="number">{100 * evaluation.accuracy:.1f}<small>{scale.sign}</small></div>'
        + soft(f"{_measured(evaluation)}, 95% interval {scale.between(*evaluation.interval)}")
        + f"{_verdict(evaluation)}</div>{_bars(evaluation, before)}</div>"
    )


def _scoring(evaluation: Evaluation) -> str:
    """How an answer gets its score, in a few words."""
    if (evaluation.benchmark, evaluation.measure) != ("questions", "accuracy"):
        named = "" if evaluation.benchmark == "questions" else f" (benchmark {evaluation.benchmark})"
        return evaluation.measure + named
    boxes = any(is_box(answer) for prediction in evaluation.predictions for answer in prediction.answers)
    return "exact match, boxes by IoU of at least 0.5" if boxes else "exact match"


def _measured(evaluation: Evaluation) -> str:
    """What the large number is."""
    if evaluation.measure == "accuracy":
        return "of the answers are right"
    return evaluation.measure if evaluation.limit == 1 else f"{evaluation.measure} times 100"


def _verdict(evaluation: Evaluation) -> str:
    if not any(control in evaluation.differences for control in ("blind", "shuffled")):
        kind, heading = "", "Nobody checked whether it sees."
        words = "Neither the blind nor the shuffled control was run, so this score may owe nothing to the pictures."
    elif evaluation.sees:
        kind, heading = "right", "✓ It sees."
        done = [
            word for name, word in (("blind", "removed"), ("shuffled", "exchanged")) if name in evaluation.differences
        ]
        words = f"The same questions with the picture {' or '.join(done)} are answered clearly worse."
    else:
        kind, heading = "wrong", "✗ It does not see."
        words = "Without its own picture it answers as well, within what chance explains: the score comes from words."
    return (
        f'<div class="verdict {kind}"><strong>{heading}</strong>{words}<br>'
        f'<span class="soft">{escape(evaluation.verdict)}</span></div>'
    )


def _bars(evaluation: Evaluation, before: Evaluation | None) -> str:
    rows = [Bar(CONTROL_LABELS["pictures"], evaluation.accuracy, evaluation.interval, main=True)]
    if before is not None:
        rows.append(Bar(CONTROL_LABELS["before"], before.accuracy, before.interval))
    rows += [
        Bar(CONTROL_LABELS.get(name, name), score.accuracy, score.interval)
        for name, score in evaluation.controls.items()
    ]
    remarks = []
    if before is not None and before.num_questions < evaluation.num_questions:
        remarks.append(f" Before training {before.num_questions:,} of the questions were asked.")
    if "majority" in evaluation.controls:
        remarks.append(" The oracle takes the best answer to each wording with the solutions in hand.")
    measure = "Share of right answers" if evaluation.measure == "accuracy" else _measured(evaluation)
    return charts.bars(rows, Scale(evaluation.limit), measure, "".join(remarks))


def _warnings_section(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    rows = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return (
        f'<aside class="warnings" aria-label="Warnings"><strong>⚠ While it was trained</strong><ul>{rows}</ul></aside>'
    )


# --- questions with their pictures -------------------------------------------------------------------------------


def _cards_section(heading: str, words: str, cards: str) -> str:
    return section(heading, soft(words), "\n", cards)


def _shown_words(evaluation: Evaluation) -> str:
    words = (
        f"The first {NUM_CARDS} pictures in an order drawn with seed {evaluation.settings['seed']}, one question each; "
        "nobody picked them."
    )
    if any(prediction.probability is not None for prediction in evaluation.predictions):
        words += " p is the probability that the model gives its whole answer."
    return words


def _errors_section(evaluation: Evaluation, trained: bool, cards: Cards, errors: Sequence[Prediction]) -> str:
    if not errors:
        return ""
    heading = "Worst errors" if evaluation.limit == 1 else "Lowest scores"
    return _cards_section(heading, _errors_words(evaluation, trained), cards.answers(errors))


def _errors_words(evaluation: Evaluation, trained: bool) -> str:
    surest = any(prediction.probability is not None for prediction in evaluation.predictions)
    if evaluation.limit != 1:
        equals = ", among equals first those that the model was surest of" if surest else ""
        return f"The answers with the lowest {evaluation.measure}{equals}; one for each picture."
    wrong = sum(not prediction.correct for prediction in evaluation.predictions)
    spoiled = "right before training or without the picture" if trained else "right without the picture"
    then = "those that the model was surest of, " if surest else ""
    return (
        f"{wrong:,} of {evaluation.num_questions:,} answers are wrong. First those that were {spoiled}, "
        f"then {then}then the most frequent confusions; one for each picture."
    )


def _relevance_section(
    evaluation: Evaluation, relevance: Mapping[str, Dependence | str], cards: Cards, budget: int
) -> str:
    if not relevance:
        return ""
    asked = {prediction.id: prediction for prediction in evaluation.predictions}
    if others := [id for id in relevance if id not in asked]:
        raise ValueError(
            f"relevance has {len(others)} questions that were not asked, the first is {others[0]!r}; drop them"
        )
    found = {id: entry for id, entry in relevance.items() if isinstance(entry, Dependence)}
    missing = [(asked[id].question, entry) for id, entry in relevance.items() if isinstance(entry, str)]
    parts = []
    if found:
        how = " / ".join(dict.fromkeys(entry.how for entry in found.values()))
        parts.append(soft(f"The picture as the encoder reads it, and over it, the warmer the more: {how}."))
        parts.append(cards.maps([asked[id] for id in found], found, budget))
    parts += [soft(f"No map for {question!r}: {reason}") for question, reason in missing]
    return section("What its answers depended on", *parts)


# --- numbers -----------------------------------------------------------------------------------------------------


def _types_section(evaluation: Evaluation) -> str:
    names, scale = list(evaluation.controls), Scale(evaluation.limit)
    rows = [
        [kind, f"{score.num_questions:,}", scale.text(score.accuracy), scale.between(*score.interval)]
        + [scale.text(score.controls[name]) for name in names]
        for kind, score in evaluation.by_type.items()
    ]
    score_head = "Right" if evaluation.measure == "accuracy" else _measured(evaluation)
    head = ["Kind", "Questions", score_head, "95% interval", *(CONTROL_HEADS.get(name, name) for name in names)]
    return section("By kind of question", table(head, rows), _yes_no_words(evaluation))


def _yes_no_words(evaluation: Evaluation) -> str:
    """What is said to yes/no questions, beside what saying always the same would be worth."""
    words = []
    for kind, score in evaluation.by_type.items():
        if score.yes_rate is None or score.neither_rate is None or score.always_yes is None or score.always_no is None:
            continue
        named = "Yes/no questions" if kind == "yes/no" else f"Yes/no questions of kind {kind}"
        words.append(
            f"{named}: yes is said to {percent(score.yes_rate)} of them, neither yes nor no "
            f"to {percent(score.neither_rate)}; always saying yes would be right for {percent(score.always_yes)}, "
            f"always saying no for {percent(score.always_no)}."
        )
    return "".join(map(soft, words))


def _figures_section(evaluation: Evaluation) -> str:
    """Figures of all answers together, in every condition; and those of each kind of question."""
    tables = []
    if evaluation.figures:
        conditions = list(evaluation.figures)
        head = ["Figure", *(CONTROL_HEADS.get(name, name) for name in conditions)]
        tables.append(_figures_table(head, evaluation.figures, "All questions"))
    by_kind = {kind: score.figures for kind, score in evaluation.by_type.items() if score.figures}
    if len(evaluation.by_type) > 1 and by_kind:
        tables.append(_figures_table(["Figure", *by_kind], by_kind, "By kind of question, with the picture"))
    return section("More figures", *tables) if tables else ""


def _figures_table(head: Sequence[str], columns: Mapping[str, Mapping[str, float]], caption: str) -> str:
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    rows = [
        [FIGURE_LABELS.get(name, name.replace("_", " "))]
        + [f"{figures[name]:.3f}" if name in figures else "" for figures in columns.values()]
        for name in names
    ]
    return table(head, rows, caption)


def _calibration_section(evaluation: Evaluation) -> str:
    if not evaluation.calibration:
        return ""
    drawn = "".join(
        charts.reliability("all answers" if name == "all" else f"{name} questions", calibration)
        for name, calibration in evaluation.calibration.items()
    )
    words = (
        "A dot for each tenth of the probabilities that the model gave its answers; the larger, the more answers. On "
        "the dashed line it is as often right as it is sure, below it is too sure. The expected calibration error is "
        "the mean distance from the line."
    )
    return section("Is it right as often as it is sure?", soft(words), f'<div class="columns">{drawn}</div>')


def _confusions_section(evaluation: Evaluation) -> str:
    if not evaluation.confusions or evaluation.limit != 1:
        return ""
    wrong = sum(not prediction.correct for prediction in evaluation.predictions)
    rows = [
        [confusion.truth, confusion.prediction or "(nothing)", f"{confusion.count:,}", percent(confusion.count / wrong)]
        for confusion in evaluation.confusions
    ]
    pairs = table(["Truth", "Answer", "Times", "Of all errors"], rows, "The most frequent wrong pairs", numeric_from=2)
    return section(
        "What it confuses",
        f'<div class="columns"><div class="wrap">{pairs}</div>{_matrix(evaluation.predictions)}</div>',
    )


def _matrix(predictions: Sequence[Prediction]) -> str:
    """Truths of few words, the most frequent ones, and what was said in their place; a right answer in other words
    counts as the truth."""
    pairs = [(truth_of(one.answers), normalize_answer(one.prediction), one.correct) for one in predictions]
    frequency = Counter(truth for truth, _, _ in pairs if _is_label(truth))
    labels = [truth for truth, _ in frequency.most_common(MATRIX_SIZE)]
    if len(labels) < FEWEST_TRUTHS:
        return ""
    counts = [[0] * (len(labels) + 1) for _ in labels]
    column = {label: number for number, label in enumerate(labels)}
    for truth, said, correct in pairs:
        if truth in column:
            counts[column[truth]][column[truth] if correct else column.get(said, len(labels))] += 1
    caption = (
        "Truths down, answers across"
        if len(frequency) <= MATRIX_SIZE
        else (f"The {MATRIX_SIZE} most frequent of {len(frequency):,} truths down, answers across")
    )
    return charts.confusion_matrix(labels, OTHERS, counts, caption)


def _is_label(truth: str) -> bool:
    return len(truth) <= LONGEST_LABEL and len(truth.split()) <= MOST_WORDS and not is_box(truth)


def _curves_section(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    if not curves:
        return ""
    drawn = "".join(charts.curve(name, points) for name, points in curves.items())
    return section("Training", f'<div class="columns">{drawn}</div>')


# --- the model and how to make it again --------------------------------------------------------------------------


def _model_section(model_card: Mapping[str, Any]) -> str:
    facts = [[name, fact(value)] for name, value in model_card.items() if not isinstance(value, Mapping | list | tuple)]
    tables = [table(["Fact", "Value"], facts, caption="Facts", numeric_from=None)] if facts else []
    for name, value in model_card.items():
        if isinstance(value, Mapping):
            rows = [[key, fact(entry)] for key, entry in value.items()]
            tables.append(table(["Name", "Value"], rows, caption=name))
        elif isinstance(value, list | tuple):
            tables.append(_rows_table(name, value))
    if not tables:
        return ""
    return section("The model", f'<div class="columns">{"".join(tables)}</div>')


def _rows_table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    head = list(rows[0]) if rows else []
    if any(list(row) != head for row in rows):
        raise ValueError(f"the rows of {name!r} in model_card have different keys; give all rows the keys {head}")
    return table(head, [[fact(entry) for entry in row.values()] for row in rows], caption=name)


def _reproduce_section(evaluation: Evaluation, command: str | None) -> str:
    settings = {name: value for name, value in evaluation.settings.items() if name not in ("versions", "date")}
    facts = [
        ["date", evaluation.settings["date"]],
        ["versions", ", ".join(f"{name} {number}" for name, number in evaluation.settings["versions"].items())],
        *([name, fact(value)] for name, value in settings.items()),
        ["time of all answers", f"{evaluation.seconds:,.1f} s, {evaluation.questions_per_second:,.1f} inputs/s"],
    ]
    written = f"<pre><code>{escape(command)}</code></pre>" if command else ""
    return section("Make it again", written, table(["Setting", "Value"], facts, numeric_from=None))
