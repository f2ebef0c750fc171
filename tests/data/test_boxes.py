from __future__ import annotations

import doctest
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eyespot.data.boxes
import eyespot.data.wording
from eyespot.data.boxes import LAST, Box, draw_boxes, iou, parse_boxes, text_iou

CELLS = st.integers(0, 20)
SHARES = st.floats(0, 1)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    left, right = sorted(draw(st.lists(CELLS, min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(draw(st.lists(CELLS, min_size=2, max_size=2, unique=True)))
    return Box(left / 20, top / 20, right / 20, bottom / 20)


@pytest.mark.parametrize("module", [eyespot.data.boxes, eyespot.data.wording])
def test_examples_in_docstrings(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 3 and result.failed == 0


@given(boxes(), boxes())
def test_iou_is_that_of_counted_cells(a: Box, b: Box) -> None:
    """Naive: paint both on a grid and count."""
    grids = np.zeros((2, 20, 20), bool)
    for grid, box in zip(grids, (a, b), strict=True):
        left, top, right, bottom = (round(edge * 20) for edge in box)
        grid[top:bottom, left:right] = True
    expected = Fraction(int((grids[0] & grids[1]).sum()), int((grids[0] | grids[1]).sum()))
    assert iou(a, b) == iou(b, a) == pytest.approx(float(expected))


def test_iou_of_boxes_without_area() -> None:
    flat, whole = Box(0.5, 0.5, 0.5, 0.9), Box(0, 0, 1, 1)
    assert iou(flat, flat) == iou(flat, whole) == 0
    assert iou(Box(0.9, 0, 0.1, 1), whole) == 0


@given(SHARES, SHARES, SHARES, SHARES)
def test_text_keeps_a_box_to_half_a_step(left: float, top: float, right: float, bottom: float) -> None:
    box = Box(*sorted((left, right)), *sorted((top, bottom)))
    box = Box(box[0], box[2], box[1], box[3])
    if box.right - box.left < 1 / LAST or box.bottom - box.top < 1 / LAST:
        return
    text = box.to_text()
    assert len(text) == 11
    (again,) = parse_boxes(text)
    assert again == pytest.approx(box, abs=0.5 / LAST + 1e-9)
    assert again.to_text() == text


@pytest.mark.parametrize("box", [(-0.1, 0, 1, 1), (0, 0, 1, 1.01), (0.5, 0, 0.5, 1), (0.6, 0, 0.5, 1), (0, 0, 1, 0)])
def test_what_is_no_box_has_no_text(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="is no box inside the picture; give 0 <= left < right <= 1"):
        Box(*box).to_text()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10 20 30 40", [(10, 20, 30, 40)]),
        ("The dog is at [10, 20, 30, 40].", [(10, 20, 30, 40)]),
        ("(10;20;30;40) and <05 06 70 80>", [(10, 20, 30, 40), (5, 6, 70, 80)]),
        ("10\n20\t30,\n40", [(10, 20, 30, 40)]),
        ("x1=10 20 30 40 50", [(10, 20, 30, 40)]),
        ("10 20 30", []),
        ("", []),
        ("30 20 10 40", []),
        ("10 40 30 20", []),
        ("10 20 10 40", []),
        ("10 20 30 100", []),
        ("-1 20 30 40", []),
        ("10 20 30 40 then 50 60 70 80", [(10, 20, 30, 40), (50, 60, 70, 80)]),
        ("10-20 30 40 50", []),
    ],
)
def test_boxes_are_found_in_free_text(text: str, found: list[tuple[int, ...]]) -> None:
    assert parse_boxes(text) == [Box(*(edge / LAST for edge in box)) for box in found]


def test_shares_are_read_as_shares() -> None:
    assert parse_boxes("[0.1, 0.25, 0.5, 1.0]") == [Box(0.1, 0.25, 0.5, 1.0)]
    assert parse_boxes("0 0 1 1") == [Box(0, 0, 1 / LAST, 1 / LAST)]


@given(st.text(alphabet="0123456789 ,.;-[]()ab\n", max_size=60))
def test_any_text_gives_boxes_or_none(text: str) -> None:
    for box in parse_boxes(text):
        assert 0 <= box.left < box.right <= 1 and 0 <= box.top < box.bottom <= 1


def test_texts_are_scored() -> None:
    assert text_iou("10 10 50 50", "10 10 50 50") == 1
    assert text_iou("[10, 10, 50, 30]", "10 10 50 50") == pytest.approx(0.5)
    assert text_iou("I do not know", "10 10 50 50") == 0
    assert text_iou("60 60 90 90 or 10 10 50 50", "10 10 50 50") == 0  # the first one counts
    with pytest.raises(ValueError, match="true answer 'here' has no box"):
        text_iou("10 10 50 50", "here")


def test_coco_boxes_are_cut_at_the_edges() -> None:
    assert Box.from_coco([10, 20, 30, 40], (100, 200)) == pytest.approx((0.1, 0.1, 0.4, 0.3))
    assert Box.from_coco([-10, 150, 200, 100], (100, 200)) == (0, 0.75, 1, 1)


class TestDrawing:
    white = PIL.Image.new("RGB", (200, 100), "white")

    def test_frames_lie_on_the_edges_and_the_picture_stays(self) -> None:
        drawn = np.asarray(draw_boxes(self.white, [Box(0.25, 0.2, 0.75, 0.8)]))
        changed = (drawn != 255).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert (columns[0], rows[0], columns[-1], rows[-1]) == (50, 20, 150, 80)
        assert not changed[40:60, 70:130].any()
        assert self.white.getextrema() == ((255, 255),) * 3

    def test_labels_stay_inside_and_have_the_colour_of_the_frame(self) -> None:
        corner = Box(0.9, 0.0, 1.0, 0.1)
        plain, labelled = (draw_boxes(self.white, [corner], labels) for labels in (None, ["a long label"]))
        more = (np.asarray(plain) != np.asarray(labelled)).any(axis=2)
        assert np.flatnonzero(more.any(axis=0))[0] > 60 and more[:, -1].any()
        two = draw_boxes(self.white, [Box(0, 0.5, 0.2, 0.9), Box(0.5, 0.5, 0.7, 0.9)], ["one", "two"])
        assert two.getpixel((0, 70)) != two.getpixel((100, 70)) != (255, 255, 255)

    def test_a_label_for_each_box(self) -> None:
        with pytest.raises(ValueError, match="1 boxes but 2 labels were given"):
            draw_boxes(self.white, [Box(0, 0, 1, 1)], ["a", "b"])
