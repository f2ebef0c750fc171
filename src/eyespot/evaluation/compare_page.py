"""A comparison of two evaluations for people: lines of a terminal, and a single HTML file without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eyespot.evaluation.cards import card, card_list, marked
from eyespot.evaluation.charts import Bar, Scale, bars, table, ticks
from eyespot.evaluation.compare import LEVEL, Comparison, Differing, Paired
from eyespot.evaluation.page import fact, section, soft, whole_page
from eyespot.evaluation.results import write_atomically

PAGE_FILE = "comparison.html"
NUM_NAMED = 5
LONGEST_CELL = 32  # characters of a terminal
ROW_HEIGHT = 46
SCORE_HEADS = ("Kind", "Questions", "A", "B", "B - A", "95% interval", "p")
VERDICTS = {
    "A": ("wrong", "✗ B is worse.", "Chance alone does not explain a difference like this."),
    "B": ("right", "✓ B is better.", "Chance alone does not explain a difference like this."),
    "": ("", "No difference can be shown.", "Chance alone explains one like this; more questions may show it."),
}


def show(comparison: Comparison, console: Console) -> None:
    """Scores by kind, counts, questions that differ, and what was found as the last line."""
    lines = [f"A: {comparison.a}", f"B: {comparison.b}", _measured(comparison)]
    console.print(*map(Text, lines), sep="\n")
    console.print(_columns(SCORE_HEADS, _score_rows(comparison), numeric_from=1))
    if comparison.overall.outcomes:
        console.print(", ".join(f"{words} {count:,}" for words, count in comparison.overall.outcomes.items()))
    console.print(_differing_words(comparison))
    if comparison.differing:
        rows = [[one.question, " / ".join(one.answers), one.a, one.b] for one in comparison.differing]
        console.print(_columns(("Question", "Truth", "A", "B"), rows))
    console.print(*map(Text, [*_only_words(comparison), comparison.overall.line]), sep="\n")


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric_from: int = 99) -> Table:
    shown = Table(box=None, pad_edge=False)
    for column, name in enumerate(heads):
        shown.add_column(name, justify="right" if column >= numeric_from else "left")
    for row in rows:
        cells = (" ".join(cell.split()) for cell in row)
        shown.add_row(*(Text(cell if len(cell) <= LONGEST_CELL else f"{cell[:LONGEST_CELL]}…") for cell in cells))
    return shown


def write_page(folder: str | Path, comparison: Comparison, command: str | None = None) -> Path:
    """Write comparison.html, whole or not at all.

    Args:
        command: that makes it again.
    """
    sections = [
        _headline(comparison),
        _kinds_section(comparison),
        _outcomes_section(comparison.overall),
        _differing_section(comparison),
        section("Asked of one only", *map(soft, only)) if (only := _only_words(comparison)) else "",
        _settings_section(comparison),
        section("Make it again", f"<pre><code>{escape(command)}</code></pre>") if command else "",
    ]
    body = "\n".join(part for part in sections if part)
    return write_atomically(Path(folder) / PAGE_FILE, whole_page("eyespot: comparison", body))


def _headline(comparison: Comparison) -> str:
    overall, scale = comparison.overall, Scale(comparison.limit)
    kind, heading, words = VERDICTS[overall.better]
    names = "".join(f"<dt>{name}</dt><dd>{escape(of)}</dd>" for name, of in (("A", comparison.a), ("B", comparison.b)))
    shown = [
        Bar(name, score.accuracy, score.interval, main=name == "B")
        for name, score in (("A", overall.a), ("B", overall.b))
    ]
    return (
        f'<header><h1>B against A</h1><dl class="answers">{names}</dl></header><div class="headline"><div>'
        f'<div class="number">{100 * overall.difference:+.1f}<small> points</small></div>'
        + soft(f"95% interval {_between(overall)}, {overall.p_text}; {_measured(comparison)} that both were asked")
        + f'<div class="verdict {kind}"><strong>{heading}</strong>{words}</div></div>'
        + f"{bars(shown, scale, comparison.measure)}</div>"
    )


def _kinds_section(comparison: Comparison) -> str:
    if len(comparison.by_kind) < 2:
        return ""
    words = (
        f"Each kind is tested for itself. Of {len(comparison.by_kind)} kinds without any difference, "
        f"{LEVEL * len(comparison.by_kind):.2g} have a p below {LEVEL} by chance."
    )
    rows = table(SCORE_HEADS, _score_rows(comparison))
    return section("By kind of question", soft(words), _differences(_parts(comparison)), rows)


def _differences(parts: dict[str, Paired]) -> str:
    """A dot with its interval for each part, left of the middle where A is better; x in percent, y in pixels, so that
    text never shrinks."""
    marks = ticks([100 * end for paired in parts.values() for end in (0, *paired.interval)])
    reach = max(-marks[0], marks[-1])
    drawn = "".join(_difference(ROW_HEIGHT * row, reach, *part) for row, part in enumerate(parts.items()))
    height, foot = ROW_HEIGHT * len(parts), ROW_HEIGHT * len(parts) + 18
    words = "; ".join(f"{name}: {100 * paired.difference:+.1f}" for name, paired in parts.items())
    ends = (("0", "start", f"A better by {reach:g}"), ("100%", "end", f"B better by {reach:g}"))
    return (
        f'<figure><svg role="img" height="{height + 24}" aria-label="{escape(words)}">'
        f'<line class="diagonal" x1="50%" x2="50%" y1="0" y2="{height}"/>{drawn}'
        + "".join(
            f'<text class="tick" x="{x}" y="{foot}" font-size="12" text-anchor="{anchor}">{text}</text>'
            for x, anchor, text in ends
        )
        + "</svg><figcaption>Points by which B is better, and their 95% intervals over pictures.</figcaption></figure>"
    )


def _difference(top: int, reach: float, name: str, paired: Paired) -> str:
    low, middle, high = (
        f"{50 + 5000 * value / reach:.2f}%" for value in (paired.interval[0], paired.difference, paired.interval[1])
    )
    y, kind = top + 32, "bar main" if paired.better else "bar"
    return (
        f'<text x="0" y="{top + 18}" font-size="14">{escape(name)}</text>'
        f'<text x="100%" y="{top + 18}" font-size="14" font-weight="600" text-anchor="end">'
        f"{100 * paired.difference:+.1f}</text>"
        f'<rect class="track" x="0" y="{y - 4}" width="100%" height="8" rx="4"/>'
        f'<line class="whisker" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
        f'<circle class="{kind}" cx="{middle}" cy="{y}" r="6"/>'
    )


def _outcomes_section(overall: Paired) -> str:
    if not overall.outcomes:
        return ""
    rows = [[words, f"{n:,}", f"{n / overall.num_questions:.1%}"] for words, n in overall.outcomes.items()]
    return section("Right and wrong", f'<div class="wrap">{table(["Answers", "Questions", "Share"], rows)}</div>')


def _differing_section(comparison: Comparison) -> str:
    cards = [_card(one, Scale(comparison.limit)) for one in comparison.differing]
    return section("Where they differ", soft(_differing_words(comparison)), card_list(cards) if cards else "")


def _card(one: Differing, scale: Scale) -> str:
    truth = escape(" / ".join(dict.fromkeys(one.answers)))
    said = [("A", marked(one.a, one.score_a, scale)), ("B", marked(one.b, one.score_b, scale))]
    return card("", one.question, [("Truth", truth), *said])


def _settings_section(comparison: Comparison) -> str:
    if not comparison.settings:
        return ""
    rows = [[name, *map(fact, values)] for name, values in comparison.settings.items()]
    words = "The evaluations were not made in the same way in all respects."
    return section("What else differs", soft(words), table(["Setting", "A", "B"], rows, numeric_from=None))


def _measured(comparison: Comparison) -> str:
    overall = comparison.overall
    return f"{comparison.measure} of {overall.num_questions:,} questions about {comparison.num_pictures:,} pictures"


def _parts(comparison: Comparison) -> dict[str, Paired]:
    return {"all": comparison.overall, **(comparison.by_kind if len(comparison.by_kind) > 1 else {})}


def _score_rows(comparison: Comparison) -> list[list[str]]:
    scale = Scale(comparison.limit)
    return [
        [
            name,
            f"{paired.num_questions:,}",
            scale.text(paired.a.accuracy),
            scale.text(paired.b.accuracy),
            f"{100 * paired.difference:+.1f}",
            _between(paired),
            paired.p_text.removeprefix("p ").removeprefix("= "),
        ]
        for name, paired in _parts(comparison).items()
    ]


def _between(paired: Paired) -> str:
    low, high = (100 * end for end in paired.interval)
    return f"{low:.1f} to {high:.1f}"


def _differing_words(comparison: Comparison) -> str:
    shown, number = len(comparison.differing), comparison.num_differing
    which = f"; here are {shown} of the largest differences" if number > shown else ""
    return f"{number:,} of {comparison.overall.num_questions:,} answers differ in their score{which}."


def _only_words(comparison: Comparison) -> list[str]:
    lines = []
    for name, ids in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if ids:
            more = f" and {len(ids) - NUM_NAMED:,} more" if len(ids) > NUM_NAMED else ""
            lines.append(f"{len(ids):,} questions only {name} was asked: {', '.join(ids[:NUM_NAMED])}{more}")
    return lines
