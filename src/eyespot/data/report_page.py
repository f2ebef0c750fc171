"""The page of a data report: a single HTML file without scripts and without anything from outside."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyespot.data.report import QUANTILES, DataReport
from eyespot.data.sample import ImageSource, Sample
from eyespot.processing.images import ImageError, open_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THUMBNAIL_SIZE = 224
INK, BAR, QUIET = "#78828c", "#2a9299", "#a9b3bb"  # readable on a light and on a dark page
LABEL_CHARS = 40
MAX_BINS = 40
STYLE = """
.chart{display:block;width:100%;min-width:640px}
.pairs{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:2px}.pair .none{height:180px}
.visits{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,150px),1fr));gap:14px;margin:20px 0 0}
.visits img{width:100%;height:150px;object-fit:contain;background:var(--line)}
"""


def write(
    folder: Path,
    report: DataReport,
    *,
    title: str,
    style: str,
    command: str | None = None,
    max_length: int | None = None,
) -> Path:
    """Write report.json and report.html.

    Args:
        title: heading of the page.
        style: its CSS.
        command: that makes it again.
        max_length: tokens at which rows are cut, a line in their chart.

    Returns:
        The path of the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    facts = report.facts
    sections = [
        _head(facts, title),
        _sources_section(facts["sources"]),
        _left_out_section(facts["left_out"]),
        _words_section(report, max_length),
        _pictures_section(report),
        _pairs_section(report),
        _visits_section(report),
        _section("Make it again", f"<pre><code>{escape(command)}</code></pre>") if command else "",
    ]
    body = "\n".join(section for section in sections if section)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(heading: str, *parts: str) -> str:
    return f"<section><h2>{heading}</h2>{''.join(parts)}</section>"


def _head(facts: Mapping[str, Any], title: str) -> str:
    left_out = sum(reason["count"] for reason in facts["left_out"].values())
    others = [f"{facts['samples_without_picture']:,} samples have no picture"] * bool(facts["samples_without_picture"])
    others += [f"{facts['unreadable_pictures']:,} pictures cannot be opened"] * bool(facts["unreadable_pictures"])
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="soft">{facts["samples"]:,} samples about {facts["pictures"]:,} different pictures; '
        f"{left_out:,} records were left out. {'; '.join(others)}</p></header>"
    )


def _sources_section(sources: Mapping[str, Mapping[str, Any]]) -> str:
    if len(sources) == 1:
        return ""
    rows = [
        [
            name,
            f"{source['samples']:,}",
            "" if source["weight"] is None else f"{source['weight']:g}",
            f"{source['visits_of_an_epoch']:,}",
            f"{source['share_of_visits']:.1%}",
            f"{source['visits_of_an_epoch'] / source['samples']:.2f}",
        ]
        for name, source in sources.items()
    ]
    head = ["Source", "Samples", "Weight", "Visits an epoch", "Share", "Visits of a sample"]
    return _section(
        "Sources", _chart(_sources_figure(sources), "share of samples and visits by source"), _table(head, rows)
    )


def _left_out_section(left_out: Mapping[str, Mapping[str, Any]]) -> str:
    if not left_out:
        return _section("What was left out", '<p class="soft">Nothing.</p>')
    rows = [[reason, f"{of['count']:,}", "; ".join(of["first"])] for reason, of in left_out.items()]
    counts = [(reason, of["count"]) for reason, of in left_out.items()]
    figure = _figure(0.6 + 0.32 * len(counts))
    _bars(figure.subplots(), counts, "records")
    return _section(
        "What was left out", _chart(figure, "records by reason"), _table(["Reason", "Records", "First"], rows)
    )


def _words_section(report: DataReport, max_length: int | None) -> str:
    figure = _figure(2.5)
    for axes, (name, values) in zip(figure.subplots(1, len(report.lengths)), report.lengths.items(), strict=True):
        _histogram(axes, values, name)
        if name == "row, tokens" and max_length is not None:
            axes.axvline(max_length, color=INK, linestyle="--")
    texts = _figure(5.2)
    left, right = texts.subplots(1, 2)
    for axes, key, name in ((left, "first_words", "first words of questions"), (right, "answers", "answers")):
        most = [(text or "(nothing)", count) for text, count in report.facts[key]["most_frequent"]]
        distinct, count = report.facts[key]["distinct"], report.facts[key]["count"]
        _bars(axes, most, f"the most frequent of {distinct:,} {name}, {count:,} in all")
    return _section(
        "Words",
        _chart(figure, "histograms of lengths"),
        _quantiles_table(report.facts["lengths"]),
        _chart(texts, "most frequent first words and answers"),
    )


def _pictures_section(report: DataReport) -> str:
    if not report.sizes:
        return ""
    figure = _figure(3.0)
    scatter, histogram = figure.subplots(1, 2)
    widths, heights = zip(*report.sizes, strict=True)
    scatter.scatter(widths, heights, s=36, color=BAR, alpha=0.15, linewidths=0)
    scatter.set(xlabel="width, pixels", ylabel="height, pixels", xlim=(0, None), ylim=(0, None))
    _histogram(histogram, [width / height for width, height in report.sizes], "width / height")
    measures = {name: report.facts[name] for name in ("width", "height", "aspect")}
    return _section("Pictures", _chart(figure, "sizes and shapes of pictures"), _quantiles_table(measures))


def _pairs_section(report: DataReport) -> str:
    near = report.facts["near_duplicates"]
    words = (
        f"Filters left out {near['left_out']:,} samples that nearly repeat others; {near['still_there']:,} samples "
        "whose pictures nearly equal others are still there."
    )
    cards = "".join(
        f'<li class="card"><div class="pair">{_picture(kept.images[0])}{_picture(other.images[0])}</div>'
        f'<div class="body"><p class="soft">{escape(how)}</p><dl class="answers"><dt>{escape(kept.id)}</dt>'
        f"<dd>{escape(_words(kept))}</dd><dt>{escape(other.id)}</dt><dd>{escape(_words(other))}</dd></dl></div></li>"
        for kept, other, how in report.pairs
    )
    return _section(
        "Near-duplicates", f'<p class="soft">{words}</p>', f'<ul class="cards pairs">{cards}</ul>' if cards else ""
    )


def _visits_section(report: DataReport) -> str:
    if not report.visits:
        return ""
    summary = "".join(f"<li>{escape(line)}</li>" for line in report.facts["augmentation"])
    rows = "".join(
        '<div class="visits">'
        + "".join(
            f"<figure>{_picture(sample.images[0])}<figcaption>{escape(_words(sample))}</figcaption></figure>"
            for sample in visits
        )
        + "</div>"
        for visits in report.visits
    )
    words = "What a visit may show; on the left the sample without augmentation."
    return _section("Augmentation", f'<ul class="soft">{summary}</ul><p class="soft">{words}</p>', rows)


def _words(sample: Sample, most: int = 160) -> str:
    texts = (part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text")
    said = " / ".join(text for text in texts if text.strip())
    return said if len(said) <= most else f"{said[:most]} ..."


def _picture(image: ImageSource) -> str:
    try:
        picture = open_image(image)
    except ImageError:
        return '<div class="none">cannot be opened</div>'
    few_pixels = max(picture.size) <= THUMBNAIL_SIZE // 2
    picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    kind = "PNG" if few_pixels else "JPEG"
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=82)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    pixels = ' class="pixels" style="image-rendering:pixelated"' if few_pixels else ""
    return f'<img{pixels} src="data:image/{kind.lower()};base64,{data}" alt="">'


def _figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the charts of a data report need a package; pip install "eyespot[pictures]"') from error
    return Figure(figsize=(9.6, height), layout="constrained")


def _chart(figure: Figure, words: str) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK, labelsize=9)
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set(color=INK, size=10)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # its font has no Chinese; report.json has all
        figure.savefig(buffer, format="png", dpi=150, transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    picture = f'<img class="chart" src="data:image/png;base64,{data}" alt="{escape(words)}">'
    return f'<div class="scroll">{picture}</div>'


def _histogram(axes: Axes, values: Sequence[float], name: str) -> None:
    least, most = min(values, default=0), max(values, default=0)
    few_integers = most - least < MAX_BINS and all(isinstance(value, int) for value in values)
    bins = [least - 0.5 + i for i in range(int(most - least) + 2)] if few_integers else MAX_BINS
    axes.hist(values, bins=bins, color=BAR)
    axes.set(xlabel=name)


def _bars(axes: Axes, counts: Sequence[tuple[str, int]], name: str) -> None:
    """The first one on top; long names are cut, and a dollar sign is no mathematics."""
    names = [f"{text[:LABEL_CHARS]}..." if len(text) > LABEL_CHARS else text for text, _ in counts]
    places = range(len(counts))
    axes.barh(places, [count for _, count in counts], color=BAR)
    axes.set_yticks(places, [" ".join(text.split()).replace("$", r"\$") for text in names])
    axes.invert_yaxis()
    axes.set(xlabel=name)


def _sources_figure(sources: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = _figure(1.1 + 0.5 * len(sources))
    axes = figure.subplots()
    total = sum(source["samples"] for source in sources.values())
    for shift, color, name, shares in (
        (-0.2, QUIET, "of the samples", [source["samples"] / total for source in sources.values()]),
        (0.2, BAR, "of the visits", [source["share_of_visits"] for source in sources.values()]),
    ):
        places = [place + shift for place in range(len(sources))]
        axes.barh(places, [100 * share for share in shares], height=0.38, color=color, label=name)
    axes.set_yticks(range(len(sources)), list(sources))
    axes.invert_yaxis()
    axes.set(xlabel="%")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=10, labelcolor=INK)
    return figure


def _quantiles_table(measures: Mapping[str, Mapping[str, float]]) -> str:
    head = ["", "count", "mean", *QUANTILES]
    rows = [[name, *(f"{of[key]:,g}" for key in head[1:])] for name, of in measures.items() if of]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column heads the rows; columns of numbers are set to the right."""
    numeric = [
        all(row[column].replace(",", "").rstrip("%")[:1].isdigit() for row in rows) for column in range(len(head))
    ]
    side = [' class="n"' if is_numeric and column else "" for column, is_numeric in enumerate(numeric)]
    heads = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for text, kind in zip(head, side, strict=True))
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(text)}</td>" for text, kind in zip(row[1:], side[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
