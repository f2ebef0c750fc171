from __future__ import annotations

import base64
import copy
import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from eyespot.config import ConfigError
from eyespot.data.sample import Sample, text_part
from eyespot.evaluation import cards, charts
from eyespot.evaluation.benchmarks.base import Questions, Reference, Scored
from eyespot.evaluation.cards import Dependence, choose_errors, choose_shown
from eyespot.evaluation.finish import BeforeAndAfter
from eyespot.evaluation.page import STYLE
from eyespot.evaluation.report import write_page
from eyespot.evaluation.results import Calibration, Score
from eyespot.evaluation.runner import evaluate
from eyespot.inference import Answer, Assistant
from eyespot.models.int8 import to_int8
from eyespot.relevance import answer_map, trace_shown
from eyespot.training.run import Run, compose_settings

VOID = {"meta", "img", "br"}
EVIL = '<script>alert("1")</script> & "quoted"'


class Page(HTMLParser):
    """Collects elements and refuses tags that do not close each other."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


class Further(Questions):
    """Exact match, and further figures."""

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        scored = super().score(texts, references)
        return Scored(scored.samples, {"f1": sum(scored.samples) / len(texts), "odd_" + EVIL: len(texts) / 7})


class Consensus(Questions):
    """Scores up to 10, of which a text gets one for each of its letters."""

    measure, limit = "CIDEr-D", 10.0

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        return Scored([min(len(text), 10) / 10 for text in texts])


@pytest.fixture(scope="module")
def full(fakes: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page with everything on it, from real picture files and a question that tries to break out."""
    samples, tmp_path = fakes.samples(), tmp_path_factory.mktemp("full")
    random = np.random.default_rng(0)
    pictured = []
    for sample in samples:
        path = tmp_path / sample.images[0]
        if not path.exists():
            Image.fromarray(random.integers(0, 255, (400, 300, 3), dtype=np.uint8)).save(path, "PNG")
        pictured.append(replace(sample, images=(path,)))
    pictured = [replace(s, messages=_ask(s, EVIL), answers=(s.answers[0], EVIL)) for s in pictured]

    class Words(fakes.Seeing):  # type: ignore[misc,name-defined]
        def answer(self, images: Any, question: str) -> str:
            return EVIL if images and images[0].name.startswith("red") else "nothing " + EVIL

        def answer_scored(self, conversations: Any, max_new_tokens: int) -> list[Answer]:
            return [Answer(text, math.log(0.25)) for text in self.answer_batch(conversations, max_new_tokens)]

    maps = {
        sample.id: Dependence(
            random.random((400, 300, 3)).astype(np.float32), np.eye(14, dtype=np.float32), "how " + EVIL
        )
        for sample in pictured[:4]
    }
    path = write_page(
        tmp_path / "out" / "page.html",
        evaluate(Words(), pictured, name="name " + EVIL, benchmark=Further()),
        title="title " + EVIL,
        relevance={**maps, pictured[4].id: "reason " + EVIL},
        warnings=["warning " + EVIL],
        before=evaluate(fakes.Lost(), samples, name="before"),
        model_card={
            "recipe " + EVIL: EVIL,
            "parameters": [{"part": EVIL, "parameters": 1234567}],
            "settings": {"lr": 0.001},
        },
        curves={"loss " + EVIL: [(step, 2 / (step + 1)) for step in range(1000)], "one": [(5, 0.5)]},
        samples=pictured,
        command="eyespot evaluate " + EVIL,
    )
    return Page(path)


def _ask(sample: Any, question: str) -> Any:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return ({"role": "user", "content": content}, sample.messages[1])


def test_nothing_comes_from_outside_and_nothing_runs(full: Page) -> None:
    assert full.all("script") == full.all("link") == full.all("iframe") == []
    assert "http" not in re.sub(r'base64,[^"]*', "", full.text)
    assert "url(" not in full.text
    assert "@import" not in full.text
    for _, attributes in full.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:")


def test_all_text_is_escaped(full: Page) -> None:
    assert "<script" not in full.text
    assert full.text.count("&lt;script&gt;") > 20
    assert "".join(full.words).count('<script>alert("1")</script>') > 20


def test_pictures_are_small_and_described(full: Page) -> None:
    images = full.all("img")
    assert len(images) == 2 * cards.NUM_CARDS + 2 * 4
    assert all(image["alt"] for image in images)
    for image in images:
        kind, _, encoded = str(image["src"]).partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert kind == f"data:image/{str(picture.format).lower()}"
        assert picture.size in ((192, 256), (144, 192))  # noise is the hardest case, and has to shrink
    assert len(full.text) < 1_050_000


def test_pictures_shrink_to_the_budget() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
    large, small = cards.thumbnail(noise, 10**6)[0], cards.thumbnail(noise, 12_000)[0]
    assert len(small) < len(large)
    assert len(base64.b64decode(small.partition(",")[2])) <= 12_000


def test_drawings_keep_their_exact_pixels() -> None:
    drawing = Image.new("RGB", (64, 64), "teal")
    uri, few_pixels = cards.thumbnail(drawing, 30_000)
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).tobytes() == drawing.tobytes()
    assert few_pixels


def test_accessible_on_a_phone_and_in_the_dark(full: Page) -> None:
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in full.all("meta")
    assert "prefers-color-scheme:dark" in full.text
    assert full.all("html") == [{"lang": "en"}]
    assert all(image.get("aria-label") for image in full.all("svg"))
    assert all(head.get("scope") in ("col", "row") for head in full.all("th"))
    assert len(full.all("h1")) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_enough_to_read(scheme: str) -> None:
    """At least 4.5, the level AA of https://www.w3.org/TR/WCAG22/#contrast-minimum."""
    block = STYLE.split(":root{")[1 if scheme == "light" else 2].split("}")[0]
    colours = dict(re.findall(r"--([a-z-]+):(#[0-9a-f]+)", block))

    def shares(colour: str) -> list[float]:
        digits = colour.lstrip("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        return [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]

    def mixed(colour: str, ground: str, share: float) -> str:
        pairs = zip(shares(colour), shares(ground), strict=True)
        return "#" + "".join(f"{round(255 * (share * top + (1 - share) * below)):02x}" for top, below in pairs)

    def luminance(name: str) -> float:
        parts = shares(colours[name])
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    # numbers of the confusion matrix stand on as much of these colours as it may have
    for name in ("right", "wrong"):
        colours[f"shaded-{name}"] = mixed(colours[name], colours["page"], charts.DARKEST / 100)
    pairs = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"), ("soft", "line")]
    pairs += [("right", "right-bg"), ("wrong", "wrong-bg"), ("warn", "warn-bg"), ("ink", "warn-bg")]
    for text, ground in [*pairs, ("ink", "shaded-right"), ("ink", "shaded-wrong")]:
        high, low = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_scores_and_their_intervals_are_drawn(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    result = evaluate(fakes.Lost(), samples, name="colours")
    page = Page(write_page(tmp_path / "page.html", result, title="T"))
    widths = [rect["width"] for rect in page.all("rect") if str(rect["class"]).startswith("bar")]
    assert widths == ["50.00%", "0.00%", "50.00%", "50.00%"]  # pictures, blind, shuffled, majority
    ends = {line["x1"] for line in page.all("line") if line["class"] == "whisker"}
    assert {f"{100 * end:.2f}%" for end in result.interval} <= ends
    words = " ".join(page.words)
    assert "It does not see." in words
    assert result.verdict in words
    assert "It sees." in " ".join(
        Page(write_page(tmp_path / "b.html", evaluate(fakes.Seeing(), samples, name="c"), title="T")).words
    )
    unchecked = evaluate(fakes.Seeing(), samples, name="c", controls=("majority",))
    assert "Nobody checked" in " ".join(Page(write_page(tmp_path / "c.html", unchecked, title="T")).words)


def test_answers_are_marked_by_sign_colour_and_word(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    after, before = (evaluate(model, samples, name="c") for model in (fakes.Seeing(), fakes.Blind()))
    page = Page(write_page(tmp_path / "page.html", after, title="T", before=before))
    words = " ".join(page.words)
    assert words.count("Untrained") == words.count("Trained") == cards.NUM_CARDS  # no error, so no cards of errors
    marks = [span["class"] for span in page.all("span") if str(span.get("class")).startswith("mark")]
    assert marks.count("mark right") == words.count("✓") - 1  # one more in the verdict
    assert marks.count("mark wrong") == words.count("✗") > 0


def test_cards_are_drawn_by_seed_with_distinct_pictures(fakes: SimpleNamespace, samples: list[Any]) -> None:
    results = [evaluate(fakes.Blind(), samples, name="c", seed=seed) for seed in (0, 0, 1)]
    shown = [[row.id for row in choose_shown(result)] for result in results]
    assert shown[0] == shown[1] != shown[2]
    assert len({row.group for row in choose_shown(results[0])}) == cards.NUM_CARDS
    # Whether an answer is right must not change what is shown.
    other = evaluate(fakes.Seeing(), samples, name="c", seed=0)
    assert [row.id for row in choose_shown(other)] == shown[0]


def test_worst_errors_are_those_that_training_or_the_picture_spoiled(
    fakes: SimpleNamespace, samples: list[Any]
) -> None:
    result = evaluate(fakes.Blind(), samples, name="c")
    wrong = [row for row in result.predictions if not row.correct]
    spoiled = replace(wrong[-1], blind_prediction=wrong[-1].answers[0], blind_score=1.0)
    changed = replace(result, predictions=(*(row for row in result.predictions if row.id != spoiled.id), spoiled))
    assert choose_errors(changed, {})[0] == spoiled
    assert not any(row.correct for row in choose_errors(changed, {}))
    earlier = {row.id: replace(row, score=float(row.id == wrong[4].id)) for row in wrong}
    assert choose_errors(result, earlier)[0] == wrong[4]


def test_long_curves_are_averaged_and_axes_hold_the_data() -> None:
    points, width = charts.thinned([(step, step % 2) for step in range(1000)])
    assert (len(points), width) == (250, 4)
    assert {value for _, value in points} == {0.5}
    for values in ([0.0, 1200.0], [0.2185, 2.684], [-3.0, -2.9], [5.0], [0.0], [1e-9, 3e-9]):
        ticks = charts.ticks(values)
        assert ticks[0] <= min(values) <= max(values) <= ticks[-1]
        assert 2 <= len(ticks) <= 8
        assert ticks == sorted(set(ticks))


@pytest.mark.parametrize("points", [[], [(0, float("nan"))]])
def test_curves_that_cannot_be_drawn_are_refused(
    fakes: SimpleNamespace, samples: list[Any], tmp_path: Path, points: list[tuple[float, float]]
) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c")
    with pytest.raises(ValueError, match="curve 'loss'"):
        write_page(tmp_path / "page.html", result, title="T", curves={"loss": points})
    assert not (tmp_path / "page.html").exists()


def test_what_does_not_belong_together_is_refused(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c")
    others = evaluate(fakes.Seeing(), [replace(s, id="x" + s.id) for s in samples], name="other")
    with pytest.raises(ValueError, match="'other'"):
        write_page(tmp_path / "page.html", result, title="T", before=others)
    with pytest.raises(ValueError, match="samples lack"):
        write_page(tmp_path / "page.html", result, title="T", samples=samples[:2])
    with pytest.raises(ValueError, match="different keys"):
        write_page(tmp_path / "page.html", result, title="T", model_card={"parts": [{"a": 1}, {"b": 2}]})


@pytest.mark.parametrize(
    ("controls", "words"),
    [(("blind",), "removed"), (("shuffled",), "exchanged"), (("blind", "shuffled"), "removed or exchanged")],
)
def test_the_verdict_names_only_controls_that_were_run(
    samples: list[Any], fakes: SimpleNamespace, tmp_path: Path, controls: tuple[str, ...], words: str
) -> None:
    seen = evaluate(fakes.Seeing(), samples, name="c", controls=controls)
    text = " ".join(Page(write_page(tmp_path / "page.html", seen, title="t")).words)
    assert f"with the picture {words} are answered clearly worse" in text


def test_boxes_of_answer_and_truth_are_drawn(fakes: SimpleNamespace) -> None:
    class Points(fakes.Seeing):  # type: ignore[misc,name-defined]
        def answer(self, images: Any, question: str) -> str:
            return "it is at 50 50 99 99" if images else "nowhere"

    asked = fakes.sample("a", ["red-1"], "where?", "00 00 40 40", "p")
    row = evaluate(Points(), [asked], name="c", controls=()).predictions[0]
    picture = Image.new("RGB", (64, 32), "white")
    drawn = np.asarray(cards.with_boxes(picture, row)).astype(int)
    assert drawn.shape == (128, 256, 3)
    coloured = drawn.max(2) - drawn.min(2) > 100
    assert coloured[0, 100] and coloured[50, 103]  # the upper and the right edge of the truth
    assert coloured[127, 200] and coloured[100, 255] and coloured[64, 200]  # three edges of the answer
    assert not coloured[100, 60]
    assert not coloured[:, 110:125].any()
    silent = np.asarray(cards.with_boxes(picture, replace(row, prediction="nowhere"))).astype(int)
    assert not (silent.max(2) - silent.min(2) > 100)[60:].any()
    assert cards.with_boxes(picture, replace(row, answers=("red",))) is picture


# --- other measures, and probabilities ---------------------------------------------------------------------------


def written(path: Path, result: Any, **more: Any) -> tuple[Page, str]:
    """A page and all its words."""
    page = Page(write_page(path / "page.html", result, title="T", **more))
    return page, " ".join(" ".join(page.words).split())


def bar_widths(page: Page) -> list[str]:
    return [str(rect["width"]) for rect in page.all("rect") if str(rect["class"]).startswith("bar")]


def test_the_words_fit_the_measure(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    class Overlap(Questions):
        measure = "IoU >= 0.5"

    class Named(Questions):
        source = {"benchmark": "pope"}

    _, words = written(tmp_path, evaluate(fakes.Seeing(), samples, name="c"))
    assert "scored by exact match" in words and "of the answers are right, 95% interval 100.0 to 100.0%" in words
    assert "Share of right answers from 0 to 100%" in words
    boxes = [replace(sample, answers=("10 10 50 50",)) for sample in samples]
    _, words = written(tmp_path, evaluate(fakes.Seeing(), boxes, name="c"))
    assert "scored by exact match, boxes by IoU of at least 0.5" in words
    _, words = written(tmp_path, evaluate(fakes.Seeing(), samples, name="c", benchmark=Named()))
    assert "scored by accuracy (benchmark pope)" in words and "of the answers are right" in words
    _, words = written(tmp_path, evaluate(fakes.Seeing(), samples, name="c", benchmark=Overlap()))
    assert "scored by IoU >= 0.5" in words and "IoU >= 0.5, 95% interval 100.0 to 100.0%" in words
    assert "exact match" not in words and "of the answers are right" not in words and "Right" not in words


def test_scores_beyond_one_point_have_no_percent_and_an_axis_of_their_own(
    fakes: SimpleNamespace, samples: list[Any], tmp_path: Path
) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c", benchmark=Consensus())
    page, words = written(tmp_path, result)
    assert "scored by CIDEr-D" in words and "CIDEr-D times 100, 95% interval" in words
    low, high = result.interval
    assert f"{100 * low:.1f} to {100 * high:.1f} " in words
    end = next(step for step in (0.3, 0.4, 0.5, 0.6) if step >= max(high, result.controls["majority"].interval[1]))
    assert f"CIDEr-D times 100 from 0 to {100 * end:g};" in words
    assert bar_widths(page)[0] == f"{100 * result.accuracy / end:.2f}%"
    assert not any(str(span.get("class")).startswith("mark") for span in page.all("span"))
    assert "Lowest scores" in words and "Worst errors" not in words and "What it confuses" not in words
    shown = choose_shown(result)[0]
    assert f"{shown.prediction} score\xa0{100 * shown.score:.1f}".replace("\xa0", " ") in words


def test_an_axis_ends_at_a_round_number() -> None:
    for scores, end in (([0.832, 0.1], 1.0), ([0.41], 0.5), ([1.21], 2.0), ([0.06], 0.06), ([0.0], 1.0), ([9.9], 10.0)):
        assert charts.Scale(10.0).end(scores) == end
    assert charts.Scale(1.0).end([0.01]) == 1.0


def test_every_control_has_a_bar_and_unknown_ones_their_own_name(
    fakes: SimpleNamespace, samples: list[Any], tmp_path: Path
) -> None:
    yes_no = [sample for sample in samples if sample.answers[0] in ("yes", "no")]
    result = evaluate(fakes.Seeing(), yes_no, name="c")
    odd = {name: replace(kind, controls={**kind.controls, "odd": 0.5}) for name, kind in result.by_type.items()}
    result = replace(result, controls={**result.controls, "odd": Score(0.5, (0.4, 0.6))}, by_type=odd)
    page, words = written(tmp_path, result)
    assert all(name in words for name in ("Always yes 25.0", "Always no 75.0", "odd 50.0"))
    assert bar_widths(page)[-3:] == ["25.00%", "75.00%", "50.00%"]
    assert {"Always yes", "Always no", "odd"} <= set(page.words)


def with_probabilities(result: Any, probability_of: Any) -> Any:
    rows = tuple(replace(row, probability=probability_of(number)) for number, row in enumerate(result.predictions))
    return replace(result, predictions=rows)


def test_cards_say_how_probable_the_answer_was_to_the_model(
    fakes: SimpleNamespace, samples: list[Any], tmp_path: Path
) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c")
    _, words = written(tmp_path, result)
    assert "p is the probability" not in words and "p =" not in words
    _, words = written(tmp_path, with_probabilities(result, lambda number: 0.93))
    assert "p is the probability that the model gives its whole answer" in words
    assert words.count("p = 0.93") == cards.NUM_CARDS
    _, words = written(tmp_path, with_probabilities(result, lambda number: 0.001))
    assert words.count("p < 0.01") == cards.NUM_CARDS


def test_marks_follow_the_scores_and_not_the_words(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c", controls=("blind",))
    rows = tuple(replace(row, score=0.0, blind_score=0.6) for row in result.predictions)
    earlier = tuple(replace(row, prediction="nonsense", score=1.0) for row in result.predictions)
    page, words = written(
        tmp_path, replace(result, predictions=rows), before=replace(result, name="b", predictions=earlier)
    )
    marks = [span["class"] for span in page.all("span") if str(span.get("class")).startswith("mark")]
    # shown and worst errors: untrained, trained and blind on each card
    assert marks == ["mark right", "mark wrong", "mark right"] * 2 * cards.NUM_CARDS
    assert words.count("score 60.0%") == 2 * cards.NUM_CARDS


def test_the_surest_of_the_worst_errors_come_first(fakes: SimpleNamespace, samples: list[Any]) -> None:
    result = with_probabilities(evaluate(fakes.Blind(), samples, name="c"), lambda number: (number * 37 % 80) / 80)
    errors = choose_errors(result, {})
    assert [row.probability for row in errors] == sorted((row.probability for row in errors), reverse=True)
    surest = max((row for row in result.predictions if not row.correct), key=lambda row: row.probability)
    assert errors[0] == surest
    spoiled = {row.id: replace(row, score=1.0) for row in errors[-1:]}
    assert choose_errors(result, spoiled)[:2] == [errors[-1], surest]


def test_without_right_and_wrong_the_lowest_scores_are_worst(fakes: SimpleNamespace, samples: list[Any]) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c", benchmark=Consensus())
    result = with_probabilities(result, lambda number: number / 80)
    errors = choose_errors(result, {})
    low = [row for row in result.predictions if row.score < result.accuracy]
    assert errors[0] == max(low, key=lambda row: (-row.score, row.probability))
    assert [row.score for row in errors] == sorted(row.score for row in errors)
    assert len({row.group for row in errors}) == len(errors)


# --- figures, calibration, confusion -----------------------------------------------------------------------------


def rows_of(page: Page, caption: str) -> list[list[str]]:
    """The texts of a table's rows, its head the first of them."""
    words = page.words[page.words.index(caption) + 1 :]
    rows: list[list[str]] = [[]]
    for word in words:
        if word != "\n":
            rows[-1].append(word)
        elif rows[-1]:
            rows.append([])
    return rows


def test_figures_stand_beside_those_of_the_controls_and_by_kind(
    fakes: SimpleNamespace, samples: list[Any], tmp_path: Path
) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c", benchmark=Further())
    page, words = written(tmp_path, result)
    assert "More figures" in words
    expected = [f"{result.figures[name]['f1']:.3f}" for name in ("pictures", "blind", "shuffled", "majority")]
    assert ["F1", *expected] in rows_of(page, "All questions")
    assert "By kind of question, with the picture" in words
    _, words = written(tmp_path, evaluate(fakes.Seeing(), samples, name="c"))
    assert "More figures" not in words


def test_calibration_is_drawn_and_said(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    found = Calibration((0.5, 1.0), (0.25, 1.0), (100, 25), 0.2)
    result = replace(evaluate(fakes.Seeing(), samples, name="c"), calibration={"yes/no": found})
    page, words = written(tmp_path, result)
    drawn = [(float(dot["cx"] or 0), float(dot["cy"] or 0), float(dot["r"] or 0)) for dot in page.all("circle")]
    middle = (charts.LEFT + charts.RIGHT) / 2
    assert drawn[0] == (middle, charts.BOTTOM - (charts.BOTTOM - charts.TOP) / 4, charts.LARGEST_DOT)
    assert drawn[1] == (charts.RIGHT, charts.TOP, charts.LARGEST_DOT / 2)
    assert "yes/no questions: expected calibration error 20.0 points over 125 answers" in words
    assert "the mean probability is 0.60, and 40.0% are right" in words
    labels = [str(svg["aria-label"]) for svg in page.all("svg")]
    assert any("100 with probability 0.50 are right in 25.0%; 25 with" in label for label in labels)
    _, words = written(tmp_path, evaluate(fakes.Seeing(), samples, name="c"))
    assert "calibration" not in words


def test_the_matrix_counts_truths_and_answers(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    """Ten times each colour; all are called green, but blue ones, which are called something nobody asked for."""

    class Odd(fakes.Blind):  # type: ignore[misc,name-defined]
        def answer(self, images: Any, question: str) -> str:
            return "a boat" if images and images[0].startswith("blue") else "green"

    colours = [sample for sample in samples if sample.messages[0]["content"][-1]["text"].startswith("what")]
    page, _ = written(tmp_path, evaluate(Odd(), colours, name="c"))
    assert rows_of(page, "Truths down, answers across")[:5] == [
        ["Truth", "red", "green", "blue", "teal", "(another)"],
        ["red", "0", "10", "0", "0", "0"],
        ["green", "0", "10", "0", "0", "0"],
        ["blue", "0", "0", "0", "0", "10"],
        ["teal", "0", "10", "0", "0", "0"],
    ]
    shaded = [cell["style"] for cell in page.all("td") if cell.get("style")]
    assert [("right" in str(style), f"{charts.DARKEST}%" in str(style)) for style in shaded] == [
        (False, True), (True, True), (False, True), (False, True),
    ]  # fmt: skip


def test_right_in_other_words_is_on_the_diagonal_and_a_matrix_is_small(
    fakes: SimpleNamespace, samples: list[Any], tmp_path: Path
) -> None:
    many = [
        replace(sample, answers=(f"thing {number % 11}", f"thing {number % 11}", "green"))
        for number, sample in enumerate(samples)
    ]
    result = evaluate(fakes.Blind(), many, name="c")
    page, words = written(tmp_path, result)
    assert "The 8 most frequent of 11 truths down, answers across" in words
    matrix = [cell for cell in page.all("td") if str(cell.get("style")).startswith("background")]
    assert sum("--right" in str(cell["style"]) for cell in matrix) == 8  # "green" is accepted for what color
    assert len([head for head in page.all("th") if head.get("scope") == "row"]) >= 8


@pytest.mark.parametrize("answers", [("yes", "no"), ("10 10 50 50", "20 20 60 60", "30 30 70 70"), ("a b c d e " * 2,)])
def test_no_matrix_of_few_truths_boxes_or_sentences(
    fakes: SimpleNamespace, samples: list[Any], tmp_path: Path, answers: tuple[str, ...]
) -> None:
    given = [
        replace(sample, answers=(answers[number % len(answers)] + ("" if len(answers) > 1 else str(number % 3)),))
        for number, sample in enumerate(samples)
    ]
    page, _ = written(tmp_path, evaluate(fakes.Lost(), given, name="c"))
    assert not any(table.get("class") == "matrix" for table in page.all("table"))


# --- warnings, and what answers depended on ----------------------------------------------------------------------


def test_warnings_stand_below_the_verdict(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c")
    page, words = written(tmp_path, result, warnings=["Step 9: the loss exploded", "Step 12: again"])
    assert words.index("It sees") < words.index("Step 9: the loss exploded") < words.index("What it answers")
    assert page.all("aside") == [{"class": "warnings", "aria-label": "Warnings"}]
    page, _ = written(tmp_path, result)
    assert page.all("aside") == []


def test_an_overlay_is_warm_where_the_answer_comes_from() -> None:
    values = np.zeros((4, 4), dtype=np.float32)
    values[0, 3], values[2, 1] = 4.0, 1.0
    picture = np.full((32, 32, 3), (0.0, 0.5, 1.0), dtype=np.float32)
    drawn = np.asarray(cards.overlay(Dependence(picture, values, "how"))).astype(int)
    grey = np.array([128, 128, 128])
    warmth = drawn[..., 0] - drawn[..., 2]
    np.testing.assert_array_equal(drawn[20, 20], grey)
    np.testing.assert_allclose(drawn[0, 31], cards.MOST_WARM * np.array(cards.WARM) + 0.2 * grey, atol=2)
    assert warmth[0, 31] > 3 * warmth[16, 8] > 0
    assert (warmth > 0).sum() == 2 * 8 * 8
    assert np.asarray(cards.overlay(Dependence(picture, 0 * values, "how")))[0, 31].tolist() == grey.tolist()


def test_maps_stand_beside_their_pictures_and_missing_ones_are_explained(
    fakes: SimpleNamespace, samples: list[Any], tmp_path: Path
) -> None:
    result = evaluate(fakes.Seeing(), samples, name="c")
    values = np.zeros((3, 3), dtype=np.float32)
    values[2, 0] = 1
    found = Dependence(np.zeros((24, 24, 3), dtype=np.float32), values, "by a measure")
    page, words = written(tmp_path, result, relevance={"0-a": found, "1-a": "it has no gradient"})
    assert "the warmer the more: by a measure." in words
    assert "No map for 'what color is it?': it has no gradient" in words
    assert [image["alt"] for image in page.all("img")] == [
        "Picture picture 0 as the encoder reads it",
        "What the answer depended on in picture picture 0, most at the bottom left",
    ]
    with pytest.raises(ValueError, match="relevance has 1 questions that were not asked, the first is 'other'"):
        write_page(tmp_path / "page.html", result, title="T", relevance={"other": found})


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    import eyespot

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 96, **sizes}},
    )
    return Assistant(model, processor, "cpu")


def coloured(name: str, *colours: str) -> Sample:
    pictures = tuple(Image.new("RGB", (20, 30), colour) for colour in colours)
    return Sample.question(name, pictures, "what?", "red", group=name)


def asked_of(answers: dict[str, str], samples: list[Sample]) -> Any:
    """An evaluation in which a model gave these answers."""

    class Given:
        def answer_batch(self, conversations: Sequence[Any], max_new_tokens: int) -> list[str]:
            return ["" for _ in conversations]

    result = evaluate(Given(), samples, name="c", controls=(), progress=False)
    rows = tuple(replace(row, prediction=answers[row.id]) for row in result.predictions)
    return replace(result, predictions=rows)


def test_shown_answers_are_traced_to_their_pictures(assistant: Assistant, tmp_path: Path) -> None:
    samples = [coloured(name, name) for name in ("red", "teal", "blue")] + [coloured("two", "red", "blue")]
    result = asked_of({"red": "a b", "teal": "c", "blue": " ", "two": "d"}, samples)
    found = trace_shown(assistant, result, samples, 4)
    assert set(found) == {"red", "teal", "blue"}  # not the one about two pictures
    assert "the answer is empty" in str(found["blue"])
    for name, answer in (("red", "a b"), ("teal", "c")):
        traced = found[name]
        assert isinstance(traced, Dependence)
        said = coloured(name, name)
        said = replace(said, messages=(said.messages[0], {**said.messages[1], "content": [text_part(answer)]}))
        np.testing.assert_allclose(traced.values, answer_map(assistant, said).numpy(), rtol=1e-4)
        np.testing.assert_allclose(traced.picture[5, 5], np.array(ImageColor.getrgb(name)) / 255, atol=1e-6)
    page, words = written(tmp_path, result, samples=samples, relevance=found)
    assert "gradient times input" in words and "No map for 'what?': the answer is empty" in words
    assert len([image for image in page.all("img") if "depended" in str(image["alt"])]) == 2
    order = [one.id for one in choose_shown(result) if one.id != "two"]
    assert list(trace_shown(assistant, result, samples, 2)) == order[:2]
    assert trace_shown(assistant, result, samples, 0) == {}
    with pytest.raises(ValueError, match="-1 questions are to be traced"):
        trace_shown(assistant, result, samples, -1)


def test_a_model_that_cannot_be_looked_into_says_why(assistant: Assistant) -> None:
    blocked = copy.deepcopy(assistant)
    to_int8(blocked.model)
    samples = [coloured("red", "red")]
    found = trace_shown(blocked, asked_of({"red": "a"}, samples), samples, 1)
    assert "gradients do not pass the 8-bit layers" in str(found["red"])


def test_the_end_of_a_run_passes_on_its_warnings_looks_and_maps(assistant: Assistant, tmp_path: Path) -> None:
    settings = compose_settings(
        ["recipe=smoke", f"output_dir={tmp_path}", "evaluation.limit=6", "evaluation.max_new_tokens=4",
         "evaluation.controls=[blind]", "evaluation.relevance=2"]
    )  # fmt: skip
    looks = [{"step": step, "own": 1.0, "other": 1.0 + step / 8} for step in (1, 2)]
    warning = {"step": 1200, "kind": "sight", "text": "no sign that the model uses the picture"}
    run = Run(tmp_path / "smoke", settings, True, 2, 4, 1.0, [(1, 2.0)], [], None, assistant, looks, [warning])
    asked = []

    def trace(assistant: Assistant, evaluation: Any, samples: Sequence[Sample], number: int) -> dict[str, str]:
        asked.append(number)
        return {choose_shown(evaluation)[0].id: "it does not say"}

    BeforeAndAfter(settings).finish(run, "eyespot train", trace)
    words = " ".join(Page(run.folder / "report.html").words)
    assert "Step 1,200: no sign that the model uses the picture" in words
    assert "loss that the right picture saves from 0.125 at step 1 to 0.25 at step 2." in words
    assert asked == [2] and "it does not say" in words


@pytest.mark.parametrize("key", ["relevance", "before", "pictures"])
def test_numbers_below_zero_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.{key} is -1; it must be at least 0"):
        compose_settings(["recipe=smoke", f"evaluation.{key}=-1"])
