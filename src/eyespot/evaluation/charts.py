"""Numbers as inline SVG and as tables of a page: scores, curves, calibration, confusion. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from eyespot.evaluation.results import Calibration

MAX_CURVE_POINTS = 300
BAR_HEIGHT = 58
LEFT, TOP, RIGHT, BOTTOM = 46, 10, 392, 196  # of what is drawn in a chart 400 units wide, behind its labels
SMALLEST_DOT, LARGEST_DOT = 3.0, 11.0
DARKEST = 40  # percent of colour in a cell; more would make its number hard to read


@dataclass(frozen=True)
class Scale:
    """How scores from 0 to ``limit`` are written: times 100, and in percent where they are shares."""

    limit: float

    @property
    def sign(self) -> str:
        return "%" if self.limit == 1 else ""

    def text(self, score: float) -> str:
        return f"{100 * score:.1f}{self.sign}"

    def between(self, low: float, high: float) -> str:
        return f"{100 * low:.1f} to {100 * high:.1f}{self.sign}"

    def end(self, scores: Sequence[float]) -> float:
        """Of an axis that begins at 0: 1 for shares, else a round number from the greatest score on.

        >>> Scale(1.0).end([0.3]), Scale(10.0).end([0.832]), Scale(10.0).end([0.41])
        (1.0, 1.0, 0.5)
        """
        greatest = max(scores)
        if self.limit == 1 or greatest <= 0:
            return 1.0
        power = 10.0 ** math.floor(math.log10(greatest))
        return next(
            float(f"{factor * power:.3g}") for factor in (1, 2, 3, 4, 5, 6, 8, 10) if factor * power >= greatest
        )


@dataclass(frozen=True)
class Bar:
    """A score with its name; main is the one that the others are compared with."""

    label: str
    score: float
    interval: tuple[float, float]
    main: bool = False


def bars(rows: Sequence[Bar], scale: Scale, measure: str, remark: str = "") -> str:
    """Scores as bars with their intervals as whiskers; x in percent and y in pixels, so that text never shrinks."""
    end = scale.end([value for row in rows for value in (row.score, *row.interval)])
    drawn = "".join(_bar(number * BAR_HEIGHT, row, scale, end) for number, row in enumerate(rows))
    words = "; ".join(f"{row.label}: {scale.text(row.score)}" for row in rows)
    return (
        f'<figure><svg role="img" height="{BAR_HEIGHT * len(rows)}" aria-label="{escape(words)}">{drawn}</svg>'
        f"<figcaption>{escape(measure)} from 0 to {100 * end:g}{scale.sign}; the line at the end of a bar is the 95% "
        f"interval, over pictures.{escape(remark)}</figcaption></figure>"
    )


def _bar(top: int, row: Bar, scale: Scale, end: float) -> str:
    low, high = (f"{100 * value / end:.2f}%" for value in row.interval)
    kind = "bar main" if row.main else "bar"
    middle = top + 35
    return (
        f'<text x="0" y="{top + 18}" font-size="14">{escape(row.label)}</text>'
        f'<text x="100%" y="{top + 18}" font-size="14" font-weight="600" text-anchor="end">{100 * row.score:.1f}</text>'
        f'<rect class="track" x="0" y="{top + 27}" width="100%" height="16" rx="4"/>'
        f'<rect class="{kind}" x="0" y="{top + 27}" width="{100 * row.score / end:.2f}%" height="16" rx="4"/>'
        f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>'
        + "".join(f'<line class="whisker" x1="{x}" x2="{x}" y1="{middle - 5}" y2="{middle + 5}"/>' for x in (low, high))
    )


@dataclass(frozen=True)
class Axes:
    """Numbers to places in a chart; ticks are marked, and those of y are the ends of its axis."""

    x_ends: tuple[float, float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        (left, right), (low, high) = self.x_ends, (self.y_ticks[0], self.y_ticks[-1])
        return (
            LEFT + (RIGHT - LEFT) * (x - left) / (right - left),
            BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low),
        )

    def draw(self, x_name: str) -> str:
        left = self.x_ends[0]
        rows = [(self.at(left, y)[1], y) for y in self.y_ticks]
        columns = [(self.at(x, self.y_ticks[0])[0], x) for x in self.x_ticks]
        return "".join(
            [
                f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" font-size="12" text-anchor="end">{value:g}</text>'
                for y, value in rows
            ]
            + [
                f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 18}" font-size="12" text-anchor="middle">{value:g}</text>'
                for x, value in columns
            ]
            + [
                f'<text class="tick" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 40}" font-size="12" text-anchor="middle">'
                f"{escape(x_name)}</text>"
            ]
        )


def _chart(drawn: str, words: str, caption: str) -> str:
    """400 units wide, so that its text has a readable size on a phone and on a desk."""
    return (
        f'<figure><svg role="img" viewBox="0 0 400 {BOTTOM + 44}" aria-label="{escape(words)}">{drawn}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """A line chart over steps.

    Raises:
        ValueError: no point, or one that is not finite.
    """
    if not points or not all(math.isfinite(number) for point in points for number in point):
        raise ValueError(f"curve {name!r} has {len(points)} points; at least 1 is needed and all must be finite")
    thin, width = thinned(points)
    x_ticks, y_ticks = ticks([x for x, _ in points]), ticks([y for _, y in thin])
    low, high = min(points)[0], max(points)[0]
    if low == high:
        low, high = x_ticks[0], x_ticks[-1]
    axes = Axes((low, high), [x for x in x_ticks if low <= x <= high], y_ticks)
    line = " ".join("{:.1f},{:.1f}".format(*axes.at(x, y)) for x, y in thin)
    averaged = f" Each point is the mean of {width} values." if width > 1 else ""
    first, last = points[0], points[-1]
    words = f"{name} from {first[1]:.4g} at step {first[0]:g} to {last[1]:.4g} at step {last[0]:g}."
    return _chart(f'{axes.draw("step")}<polyline class="curve" points="{line}"/>', words, words + averaged)


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """At most MAX_CURVE_POINTS points, each the mean of so many neighbours."""
    width = math.ceil(len(points) / MAX_CURVE_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], width


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the least to above the greatest value, about five, at least two."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.10g}") for number in range(first, max(last, first + 1) + 1)]


def reliability(name: str, calibration: Calibration) -> str:
    """Share of right answers over their mean probability, a dot for each tenth that has answers, larger for more.

    On the diagonal a model is as sure as it is right; below it, it is too sure.
    Source: Guo et al., arXiv 1706.04599, figure 1.
    """
    rows = list(zip(calibration.probability, calibration.accuracy, calibration.number, strict=True))
    steps = [number / 5 for number in range(6)]
    axes, most, total = Axes((0.0, 1.0), steps, steps), max(calibration.number), sum(calibration.number)
    (x1, y1), (x2, y2) = axes.at(0, 0), axes.at(1, 1)
    drawn = [
        axes.draw("probability of the answer"),
        f'<text class="tick" transform="translate(12 {(TOP + BOTTOM) / 2}) rotate(-90)" font-size="12" '
        'text-anchor="middle">share right</text>',
        f'<line class="diagonal" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>',
    ]
    for probability, accuracy, number in rows:
        x, y = axes.at(probability, accuracy)
        radius = max(SMALLEST_DOT, LARGEST_DOT * math.sqrt(number / most))
        said = f"{number:,} answers: probability {probability:.2f}, right {accuracy:.2f}"
        drawn.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{said}</title></circle>')
    sure, right = (sum(row[column] * row[2] for row in rows) / total for column in (0, 1))
    words = f"{name}: expected calibration error {100 * calibration.error:.1f} points over {total:,} answers"
    listed = "; ".join(f"{number:,} with probability {p:.2f} are right in {100 * a:.1f}%" for p, a, number in rows)
    mean = f"the mean probability is {sure:.2f}, and {100 * right:.1f}% are right"
    return _chart("".join(drawn), f"{words}: {listed}", f"{words}; {mean}.")


def confusion_matrix(labels: Sequence[str], others: str, counts: Sequence[Sequence[int]], caption: str) -> str:
    """A row for each truth, a column for each answer in the same order and one for all others, shaded by row.

    counts: [len(labels)][len(labels) + 1].
    """
    heads = "".join(f'<th scope="col"><span>{escape(text)}</span></th>' for text in (*labels, others))
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(_cell(count, sum(row), row_number == column) for column, count in enumerate(row))
        + "</tr>\n"
        for row_number, (label, row) in enumerate(zip(labels, counts, strict=True))
    )
    return _scrolling(
        f'<table class="matrix"><caption>{escape(caption)}</caption><thead><tr><th scope="col">Truth</th>{heads}</tr>'
        f"</thead><tbody>\n{body}</tbody></table>",
        caption,
    )


def _cell(count: int, total: int, right: bool) -> str:
    if count == 0:
        return '<td class="soft">0</td>'
    colour = "var(--right)" if right else "var(--wrong)"
    shade = max(6, round(DARKEST * count / total))
    return f'<td style="background:color-mix(in srgb,{colour} {shade}%,transparent)">{count:,}</td>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None, numeric_from: int | None = 1
) -> str:
    """A table whose first column heads the rows; columns from numeric_from on are set to the right."""

    def side(column: int) -> str:
        return ' class="n"' if numeric_from is not None and column >= numeric_from else ""

    heads = "".join(f'<th scope="col"{side(column)}>{escape(text)}</th>' for column, text in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{side(column)}>{escape(text)}</td>" for column, text in enumerate(row[1:], start=1))
        + "</tr>\n"
        for row in rows
    )
    words = f"<caption>{escape(caption)}</caption>" if caption else ""
    return _scrolling(
        f"<table>{words}<thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table>", caption or head[0]
    )


def _scrolling(content: str, name: str) -> str:
    """What is wider than a phone scrolls in its own box, which the keyboard must be able to reach."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{content}</div>'


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"
