"""One page that shows what a model sees: a single HTML file without scripts and without anything from outside."""

from __future__ import annotations

import base64
import io
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from eyespot.evaluation.metrics import is_right, normalize_answer
from eyespot.evaluation.results import Evaluation, Prediction, write_atomically
from eyespot.evaluation.runner import truth_of
from eyespot.processing.images import ImageInput, open_image

if TYPE_CHECKING:
    from eyespot.data.sample import Sample

NUM_CARDS = 12
# All thumbnails together, before base64 adds a third: the page stays near 1 MB.
THUMBNAILS_BYTES = 720_000
THUMBNAIL_SIZES = (256, 192, 128, 64)
JPEG_QUALITY = 82
MAX_CURVE_POINTS = 300

CONTROL_LABELS = {
    "pictures": "With the picture",
    "shuffled": "Another picture (shuffled)",
    "blind": "No picture (blind)",
    "majority": "Best guess from words (oracle)",
    "before": "Before training",
}
CONTROL_HEADS = {"shuffled": "Shuffled", "blind": "Blind", "majority": "Words only (oracle)"}

STYLE = """
:root{color-scheme:light dark;--page:#faf9f6;--card:#fff;--ink:#1c1f24;--soft:#59606b;--line:#e3e0d9;
--accent:#0a6c74;--quiet:#a9b3bb;--right:#146c43;--wrong:#b02a1f;--right-bg:#e9f4ee;--wrong-bg:#fbecea}
@media (prefers-color-scheme:dark){:root{--page:#14161a;--card:#1c1f25;--ink:#e9e8e4;--soft:#a4abb6;--line:#30343c;
--accent:#58c4c4;--quiet:#59636f;--right:#74d3a0;--wrong:#ff9d92;--right-bg:#16281f;--wrong-bg:#311d1c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1040px;margin:0 auto;padding:clamp(24px,6vw,72px) clamp(16px,4vw,40px)}
h1{font-size:clamp(1.6rem,5vw,2.3rem);line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 6px}
h2{font-size:1.25rem;font-weight:650;margin:0 0 6px}
section{margin-top:clamp(40px,7vw,64px)}
p{margin:0 0 12px;max-width:68ch}
.soft,figcaption,caption{color:var(--soft);font-size:.9rem}
.headline{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:32px;margin-top:36px;
align-items:center}
.number{font-size:clamp(3.2rem,12vw,5rem);line-height:1;font-weight:680;letter-spacing:-.03em;
font-variant-numeric:tabular-nums}
.number small{font-size:.42em;font-weight:500;letter-spacing:0;color:var(--soft)}
.verdict{border-left:4px solid var(--soft);padding:4px 0 4px 16px;margin-top:24px;max-width:62ch}
.verdict strong{display:block;font-size:1.1rem}
.verdict.right{border-color:var(--right)}.verdict.wrong{border-color:var(--wrong)}
figure{margin:0}svg{display:block;width:100%;overflow:visible}
svg text{fill:var(--ink);font-family:inherit}svg .tick{fill:var(--soft)}
.bar{fill:var(--quiet)}.bar.main{fill:var(--accent)}.track,.grid{stroke:var(--line)}
.track{fill:var(--line);stroke:none;opacity:.55}.whisker{stroke:var(--ink);stroke-width:2}
.curve{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,205px),1fr));gap:20px;margin:20px 0 0;
padding:0;list-style:none}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;overflow:hidden;display:flex;
flex-direction:column}
.card img{display:block;width:100%;height:180px;object-fit:contain;background:var(--line)}
.card .none{height:72px;display:grid;place-items:center;background:var(--line);color:var(--soft);font-size:.9rem}
.card .pixels{image-rendering:pixelated}
.card .body{padding:14px 16px 16px;display:flex;flex-direction:column;gap:10px;flex:1}
.question{font-weight:600;line-height:1.35;overflow-wrap:anywhere;margin:0}
dl.answers{display:grid;grid-template-columns:auto 1fr;gap:3px 12px;margin:auto 0 0;font-size:.93rem}
dl.answers dt{color:var(--soft)}dl.answers dd{margin:0;overflow-wrap:anywhere}
.mark{border-radius:5px;padding:1px 7px;font-weight:600}
.mark.right{color:var(--right);background:var(--right-bg)}.mark.wrong{color:var(--wrong);background:var(--wrong-bg)}
.scroll{overflow-x:auto;margin-top:12px}
table{border-collapse:collapse;width:100%;font-size:.95rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:6px}
th,td{text-align:left;padding:8px 20px 8px 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:500;font-size:.87rem}tbody th{font-weight:500}
td.n,th.n{text-align:right}td.n{white-space:nowrap}.scroll+p{margin-top:14px}.narrow{max-width:620px}
th:last-child,td:last-child{padding-right:0}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:28px 44px;margin-top:12px}
.columns>*{min-width:0}.columns .scroll{margin:0}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow-x:auto;
font:.9rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:12px 0}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""


def write_page(
    path: str | Path,
    evaluation: Evaluation,
    *,
    title: str,
    before: Evaluation | None = None,
    model_card: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    samples: Sequence[Sample] | None = None,
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
        command: that makes this result again.

    Returns:
        The path.

    Raises:
        ValueError: before answers none of the evaluation's questions, samples lack a shown question, a curve is empty
            or holds a value that is not finite.
        ImageError: a picture cannot be opened (a ValueError).
        OSError: the page cannot be written.
    """
    earlier = _earlier(evaluation, before)
    shown, errors = choose_shown(evaluation), choose_errors(evaluation, earlier)
    thumbnails = _thumbnails([*shown, *errors], samples)
    sections = [
        _headline(evaluation, before, title),
        _cards_section("What it answers", _shown_words(evaluation), shown, earlier, thumbnails),
        _cards_section("Worst errors", _errors_words(evaluation, before is not None), errors, earlier, thumbnails),
        _types_section(evaluation),
        _confusions_section(evaluation),
        _curves_section(curves or {}),
        _model_section(model_card or {}),
        _reproduce_section(evaluation, command),
    ]
    return write_atomically(path, _page(title, "\n".join(section for section in sections if section)))


def choose_shown(evaluation: Evaluation) -> list[Prediction]:
    """The first questions about distinct pictures in an order drawn by the evaluation's seed; nobody picks them."""
    order = list(evaluation.predictions)
    random.Random(evaluation.settings["seed"]).shuffle(order)
    return _one_per_picture(order)


def choose_errors(evaluation: Evaluation, earlier: Mapping[str, Prediction]) -> list[Prediction]:
    """The worst wrong answers, one for each picture.

    Worst is what training or the picture spoiled: right before training and right without the picture count one each.
    Among equals the more frequent confusion comes first, then the order of the samples.
    """
    wrong = [prediction for prediction in evaluation.predictions if not prediction.correct]
    frequency = Counter(_pair(prediction) for prediction in wrong)

    def badness(prediction: Prediction) -> tuple[int, int]:
        spoiled = prediction.id in earlier and earlier[prediction.id].correct
        return spoiled + _blind_correct(prediction), frequency[_pair(prediction)]

    return _one_per_picture(sorted(wrong, key=badness, reverse=True))


def _one_per_picture(predictions: Iterable[Prediction]) -> list[Prediction]:
    first: dict[str, Prediction] = {}
    for prediction in predictions:
        first.setdefault(prediction.group, prediction)
    return list(first.values())[:NUM_CARDS]


def _pair(prediction: Prediction) -> tuple[str, str]:
    return truth_of(prediction.answers), normalize_answer(prediction.prediction)


def _blind_correct(prediction: Prediction) -> bool:
    return prediction.blind_score is not None and prediction.blind_score >= 0.5


def _earlier(evaluation: Evaluation, before: Evaluation | None) -> dict[str, Prediction]:
    """Predictions before training by sample id; empty without an evaluation before."""
    if before is None:
        return {}
    earlier = {prediction.id: prediction for prediction in before.predictions}
    if not any(prediction.id in earlier for prediction in evaluation.predictions):
        raise ValueError(f"before ({before.name!r}) has 0 questions of {evaluation.name!r}; evaluate the same samples")
    return earlier


def _thumbnails(predictions: Sequence[Prediction], samples: Sequence[Sample] | None) -> dict[str, tuple[str, bool]]:
    """Sample id -> (data URI of its first picture, whether its pixels are few); empty without samples."""
    if samples is None or not predictions:
        return {}
    images = {sample.id: sample.images for sample in samples}
    missing = [prediction.id for prediction in predictions if prediction.id not in images]
    if missing:
        raise ValueError(f"samples lack {len(missing)} shown questions, the first is {missing[0]!r}; give them all")
    budget = THUMBNAILS_BYTES // len(predictions)
    return {
        prediction.id: _thumbnail(images[prediction.id][0], budget)
        for prediction in predictions
        if images[prediction.id]
    }


def _thumbnail(source: ImageInput, max_bytes: int) -> tuple[str, bool]:
    """A data URI of at most max_bytes of picture (the smallest size is kept whatever it takes)."""
    picture = open_image(source)
    encoded, kind = b"", ""
    for size in THUMBNAIL_SIZES:
        small = picture.copy()
        small.thumbnail((size, size))
        encoded, kind = _encode(small, "PNG"), "PNG"
        # Drawings stay sharp as PNG, which is small for them; a photograph is many times smaller as JPEG.
        if len(encoded) > max_bytes // 4:
            encoded, kind = _encode(small, "JPEG"), "JPEG"
        if len(encoded) <= max_bytes:
            break
    few_pixels = max(picture.size) <= THUMBNAIL_SIZES[-2]
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded).decode('ascii')}", few_pixels


def _encode(picture: Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, quality=JPEG_QUALITY)
    return buffer.getvalue()


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _headline(evaluation: Evaluation, before: Evaluation | None, title: str) -> str:
    low, high = evaluation.interval
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(evaluation.name)}: {evaluation.num_questions:,} questions about '
        f"{evaluation.num_pictures:,} pictures, exact match</p></header>"
        '<div class="headline"><div>'
        f'<div class="number">{100 * evaluation.accuracy:.1f}<small>%</small></div>'
        f'<p class="soft">of the answers are right, 95% interval {_range(low, high)}</p>'
        f"{_verdict(evaluation)}</div>{_bars(evaluation, before)}</div>"
    )


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
    """Scores as bars with their intervals as whiskers; x in percent and y in pixels, so that text never shrinks."""
    rows = [("pictures", evaluation.accuracy, evaluation.interval)]
    if before is not None:
        rows.append(("before", before.accuracy, before.interval))
    rows += [(name, score.accuracy, score.interval) for name, score in evaluation.controls.items()]
    drawn = "".join(_bar(number, *row) for number, row in enumerate(rows))
    words = "; ".join(f"{CONTROL_LABELS[name]}: {100 * accuracy:.1f}%" for name, accuracy, _ in rows)
    height = 58 * len(rows)
    oracle = " The oracle takes the best answer to each wording with the solutions in hand."
    return (
        f'<figure><svg role="img" height="{height}" aria-label="{escape(words)}">{drawn}</svg>'
        "<figcaption>Share of right answers from 0 to 100%; the line at the end of a bar is the 95% interval, "
        f"over pictures.{oracle if 'majority' in evaluation.controls else ''}</figcaption></figure>"
    )


def _bar(number: int, name: str, accuracy: float, interval: tuple[float, float]) -> str:
    top = 58 * number
    low, high = (f"{100 * end:.2f}%" for end in interval)
    kind = "bar main" if name == "pictures" else "bar"
    middle = top + 35
    return (
        f'<text x="0" y="{top + 18}" font-size="14">{escape(CONTROL_LABELS[name])}</text>'
        f'<text x="100%" y="{top + 18}" font-size="14" font-weight="600" text-anchor="end">{100 * accuracy:.1f}</text>'
        f'<rect class="track" x="0" y="{top + 27}" width="100%" height="16" rx="4"/>'
        f'<rect class="{kind}" x="0" y="{top + 27}" width="{100 * accuracy:.2f}%" height="16" rx="4"/>'
        f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>'
        + "".join(
            f'<line class="whisker" x1="{end}" x2="{end}" y1="{middle - 5}" y2="{middle + 5}"/>' for end in (low, high)
        )
    )


def _shown_words(evaluation: Evaluation) -> str:
    seed = evaluation.settings["seed"]
    return f"The first {NUM_CARDS} pictures in an order drawn with seed {seed}, one question each; nobody picked them."


def _errors_words(evaluation: Evaluation, trained: bool) -> str:
    wrong = sum(not prediction.correct for prediction in evaluation.predictions)
    spoiled = "right before training or without the picture" if trained else "right without the picture"
    return (
        f"{wrong:,} of {evaluation.num_questions:,} answers are wrong. First those that were {spoiled}, "
        "then the most frequent confusions; one for each picture."
    )


def _cards_section(
    heading: str,
    words: str,
    predictions: Sequence[Prediction],
    earlier: Mapping[str, Prediction],
    thumbnails: Mapping[str, tuple[str, bool]],
) -> str:
    if not predictions:
        return ""
    cards = "\n".join(
        _card(prediction, earlier.get(prediction.id), thumbnails.get(prediction.id)) for prediction in predictions
    )
    return f'<section><h2>{heading}</h2><p class="soft">{words}</p>\n<ul class="cards">\n{cards}\n</ul></section>'


def _card(prediction: Prediction, earlier: Prediction | None, thumbnail: tuple[str, bool] | None) -> str:
    rows = [("Truth", escape(_accepted(prediction.answers)))]
    if earlier is not None:
        rows.append(("Untrained", _marked(earlier.prediction, prediction.answers)))
    rows.append(("Trained" if earlier is not None else "Model", _marked(prediction.prediction, prediction.answers)))
    if prediction.blind_prediction is not None:
        rows.append(("Blind", _marked(prediction.blind_prediction, prediction.answers)))
    answers = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return (
        f'<li class="card">{_picture(prediction, thumbnail)}<div class="body">'
        f'<p class="question">{escape(prediction.question)}</p><dl class="answers">{answers}</dl></div></li>'
    )


def _accepted(answers: Sequence[str]) -> str:
    return " / ".join(dict.fromkeys(answers))


def _picture(prediction: Prediction, thumbnail: tuple[str, bool] | None) -> str:
    if thumbnail is None:
        return '<div class="none">picture not included</div>'
    uri, few_pixels = thumbnail
    pixels = ' class="pixels"' if few_pixels else ""
    return f'<img{pixels} src="{uri}" alt="Picture {escape(prediction.group)}, asked about below">'


def _marked(text: str, answers: Sequence[str]) -> str:
    """An answer with its sign, its colour and a word for those who hear the page."""
    right = is_right(text, answers)
    kind, sign, word = ("right", "✓", "right") if right else ("wrong", "✗", "wrong")
    shown = escape(text) if text.strip() else "<em>nothing</em>"
    said = f'<span aria-hidden="true">{sign}</span><span class="hidden">{word}:</span> {shown}'
    return f'<span class="mark {kind}">{said}</span>'


def _types_section(evaluation: Evaluation) -> str:
    names = list(evaluation.controls)
    rows = [
        [kind, f"{score.num_questions:,}", _percent(score.accuracy), _range(*score.interval)]
        + [_percent(score.controls[name]) for name in names]
        for kind, score in evaluation.by_type.items()
    ]
    head = ["Kind", "Questions", "Right", "95% interval", *(CONTROL_HEADS[name] for name in names)]
    words = "".join(
        f'<p class="soft">{_yes_no_words(kind)}: yes is said to {_percent(score.yes_rate)} of them, neither yes nor no '
        f"to {_percent(score.neither_rate)}; always saying yes would be right for {_percent(score.always_yes)}, always "
        f"saying no for {_percent(score.always_no)}.</p>"
        for kind, score in evaluation.by_type.items()
        if None not in (score.yes_rate, score.neither_rate, score.always_yes, score.always_no)
    )
    return f"<section><h2>By kind of question</h2>{_table(head, rows)}{words}</section>"


def _yes_no_words(kind: str) -> str:
    return "Yes/no questions" if kind == "yes/no" else f"Yes/no questions of kind {escape(kind)}"


def _confusions_section(evaluation: Evaluation) -> str:
    if not evaluation.confusions:
        return ""
    wrong = sum(not prediction.correct for prediction in evaluation.predictions)
    rows = [
        [
            confusion.truth,
            confusion.prediction or "(nothing)",
            f"{confusion.count:,}",
            _percent(confusion.count / wrong),
        ]
        for confusion in evaluation.confusions
    ]
    table = _table(["Truth", "Answer", "Times", "Of all errors"], rows, numeric_from=2)
    return (
        '<section><h2>What it confuses</h2><p class="soft">The most frequent wrong pairs.</p>'
        f'<div class="narrow">{table}</div></section>'
    )


def _curves_section(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    if not curves:
        return ""
    charts = "".join(_curve(name, points) for name, points in curves.items())
    return f'<section><h2>Training</h2><div class="columns">{charts}</div></section>'


def _curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """A line chart, 400 units wide, so that its text has a readable size on a phone and on a desk."""
    if not points or not all(math.isfinite(number) for point in points for number in point):
        raise ValueError(f"curve {name!r} has {len(points)} points; at least 1 is needed and all must be finite")
    thinned, width = _thinned(points)
    x_ticks, y_ticks = _ticks([x for x, _ in points]), _ticks([y for _, y in thinned])
    x_low, x_high = min(points)[0], max(points)[0]
    if x_low == x_high:
        x_low, x_high = x_ticks[0], x_ticks[-1]
    left, top, right, bottom = 46, 10, 392, 196

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - x_low) / (x_high - x_low),
            bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]),
        )

    line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in thinned)
    marks = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{at(0, y)[1]:.1f}" y2="{at(0, y)[1]:.1f}"/>'
        f'<text class="tick" x="{left - 8}" y="{at(0, y)[1] + 4:.1f}" font-size="12" text-anchor="end">{y:g}</text>'
        for y in y_ticks
    ] + [
        f'<text class="tick" x="{at(x, 0)[0]:.1f}" y="{bottom + 18}" font-size="12" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
        if x_low <= x <= x_high
    ]
    averaged = f" Each point is the mean of {width} values." if width > 1 else ""
    first, last = points[0], points[-1]
    words = f"{name} from {first[1]:.4g} at step {first[0]:g} to {last[1]:.4g} at step {last[0]:g}."
    return (
        f'<figure><svg role="img" viewBox="0 0 400 240" aria-label="{escape(words)}">{"".join(marks)}'
        f'<polyline class="curve" points="{line}"/>'
        f'<text class="tick" x="{(left + right) / 2}" y="236" font-size="12" text-anchor="middle">step</text></svg>'
        f"<figcaption>{escape(words)}{averaged}</figcaption></figure>"
    )


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """At most MAX_CURVE_POINTS points, each the mean of so many neighbours."""
    width = math.ceil(len(points) / MAX_CURVE_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], width


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the least to above the greatest value, about five, at least two."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.10g}") for number in range(first, max(last, first + 1) + 1)]


def _model_section(model_card: Mapping[str, Any]) -> str:
    facts = [
        [name, _fact(value)] for name, value in model_card.items() if not isinstance(value, Mapping | list | tuple)
    ]
    tables = [_table(["Fact", "Value"], facts, caption="Facts", numeric_from=None)] if facts else []
    for name, value in model_card.items():
        if isinstance(value, Mapping):
            rows = [[key, _fact(entry)] for key, entry in value.items()]
            tables.append(_table(["Name", "Value"], rows, caption=name))
        elif isinstance(value, list | tuple):
            tables.append(_rows_table(name, value))
    if not tables:
        return ""
    return f'<section><h2>The model</h2><div class="columns">{"".join(tables)}</div></section>'


def _rows_table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    head = list(rows[0]) if rows else []
    if any(list(row) != head for row in rows):
        raise ValueError(f"the rows of {name!r} in model_card have different keys; give all rows the keys {head}")
    return _table(head, [[_fact(entry) for entry in row.values()] for row in rows], caption=name)


def _reproduce_section(evaluation: Evaluation, command: str | None) -> str:
    settings = {name: value for name, value in evaluation.settings.items() if name not in ("versions", "date")}
    facts = [
        ["date", evaluation.settings["date"]],
        ["versions", ", ".join(f"{name} {number}" for name, number in evaluation.settings["versions"].items())],
        *([name, _fact(value)] for name, value in settings.items()),
        ["time of all answers", f"{evaluation.seconds:,.1f} s, {evaluation.questions_per_second:,.1f} inputs/s"],
    ]
    written = f"<pre><code>{escape(command)}</code></pre>" if command else ""
    return f"<section><h2>Make it again</h2>{written}{_table(['Setting', 'Value'], facts, numeric_from=None)}</section>"


def _fact(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _table(
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
    # A table wider than a phone scrolls in its own box, which the keyboard must be able to reach.
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption or head[0])}">'
    return f"{box}<table>{words}<thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}%"
