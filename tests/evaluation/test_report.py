from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eyespot.evaluation import report
from eyespot.evaluation.report import choose_errors, choose_shown, write_page
from eyespot.evaluation.runner import evaluate

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

    path = write_page(
        tmp_path / "out" / "page.html",
        evaluate(Words(), pictured, name="name " + EVIL),
        title="title " + EVIL,
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
    assert len(images) == 2 * report.NUM_CARDS
    assert all(image["alt"] for image in images)
    for image in images:
        kind, _, encoded = str(image["src"]).partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert kind == f"data:image/{str(picture.format).lower()}"
        assert picture.size == (192, 256)
    assert len(full.text) < 1_050_000


def test_pictures_shrink_to_the_budget() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
    large, small = report._thumbnail(noise, 10**6)[0], report._thumbnail(noise, 12_000)[0]
    assert len(small) < len(large)
    assert len(base64.b64decode(small.partition(",")[2])) <= 12_000


def test_drawings_keep_their_exact_pixels() -> None:
    drawing = Image.new("RGB", (64, 64), "teal")
    uri, few_pixels = report._thumbnail(drawing, 30_000)
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
    block = report.STYLE.split(":root{")[1 if scheme == "light" else 2].split("}")[0]
    colours = dict(re.findall(r"--([a-z-]+):(#[0-9a-f]+)", block))

    def luminance(name: str) -> float:
        digits = colours[name].lstrip("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"), ("soft", "line")]
    for text, ground in [*pairs, ("right", "right-bg"), ("wrong", "wrong-bg")]:
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
    assert words.count("Untrained") == words.count("Trained") == report.NUM_CARDS  # no error, so no cards of errors
    marks = [span["class"] for span in page.all("span") if str(span.get("class")).startswith("mark")]
    assert marks.count("mark right") == words.count("✓") - 1  # one more in the verdict
    assert marks.count("mark wrong") == words.count("✗") > 0


def test_cards_are_drawn_by_seed_with_distinct_pictures(fakes: SimpleNamespace, samples: list[Any]) -> None:
    results = [evaluate(fakes.Blind(), samples, name="c", seed=seed) for seed in (0, 0, 1)]
    shown = [[row.id for row in choose_shown(result)] for result in results]
    assert shown[0] == shown[1] != shown[2]
    assert len({row.group for row in choose_shown(results[0])}) == report.NUM_CARDS
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
    points, width = report._thinned([(step, step % 2) for step in range(1000)])
    assert (len(points), width) == (250, 4)
    assert {value for _, value in points} == {0.5}
    for values in ([0.0, 1200.0], [0.2185, 2.684], [-3.0, -2.9], [5.0], [0.0], [1e-9, 3e-9]):
        ticks = report._ticks(values)
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
