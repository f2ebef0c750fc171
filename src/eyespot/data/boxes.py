"""Boxes: as text, read from text, compared, and drawn on a picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

LAST = 99  # the right and the lower edge of a picture, as text; two digits say a place to half a percent

_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR = re.compile(rf"(?<![\w.-])({_NUMBER})[\s,;]+({_NUMBER})[\s,;]+({_NUMBER})[\s,;]+({_NUMBER})(?!\w|\.\d)")
_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")


class Box(NamedTuple):
    """Left, upper, right and lower edge as shares of the picture's width and height, in [0, 1]."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def area(self) -> float:
        """0 if an edge lies on the wrong side of its opposite."""
        return max(self.right - self.left, 0.0) * max(self.bottom - self.top, 0.0)

    def to_text(self) -> str:
        """Four numbers of two digits, 00 for the left and upper edge of the picture and 99 for the right and lower.

        >>> Box(0.0, 0.1, 0.5, 1.0).to_text()
        '00 10 50 99'

        Raises:
            ValueError: the box leaves the picture or has no area.
        """
        if min(self) < 0 or max(self) > 1 or self.area == 0:
            raise ValueError(f"{self} is no box inside the picture; give 0 <= left < right <= 1 and so down")
        return " ".join(f"{round(edge * LAST):02d}" for edge in self)

    @classmethod
    def from_coco(cls, bbox: Sequence[float], size: tuple[int, int]) -> Self:
        """From left, top, width and height in pixels of a picture of size (width, height), cut at its edges.

        Source: https://cocodataset.org/#format-data (bbox).
        """
        left, top, width, height = bbox
        across, down = size
        edges = (left / across, top / down, (left + width) / across, (top + height) / down)
        return cls(*(min(max(edge, 0.0), 1.0) for edge in edges))


def parse_boxes(text: str) -> list[Box]:
    """All boxes in a text, in order: four numbers with spaces, commas or semicolons between them, in brackets or not.

    Numbers with a decimal point that are all at most 1 are shares of the picture; others are read as `Box.to_text`
    writes them. Four numbers that are no box (an edge beyond the picture, or on the wrong side) are left out.

    >>> parse_boxes("at [10, 20, 50, 60]") == parse_boxes("10 20 50 60")
    True
    >>> parse_boxes("0.5,0.5,1.0,1.0")
    [Box(left=0.5, top=0.5, right=1.0, bottom=1.0)]
    >>> parse_boxes("nowhere")
    []
    """
    found = []
    for match in _FOUR.finditer(text):
        numbers = [float(number) for number in match.groups()]
        is_share = max(numbers) <= 1 and any("." in number for number in match.groups())
        box = Box(*(number if is_share else number / LAST for number in numbers))
        if min(box) >= 0 and max(box) <= 1 and box.left < box.right and box.top < box.bottom:
            found.append(box)
    return found


def is_box(text: str) -> bool:
    """Whether a text is one box and nothing else.

    >>> is_box("00 10 50 99"), is_box("at 00 10 50 99"), is_box("5")
    (True, False, False)
    """
    return _FOUR.fullmatch(text.strip()) is not None and len(parse_boxes(text)) == 1


def named_text(objects: Iterable[tuple[str, Box]]) -> str:
    """Names with their boxes, as `parse_named` reads them.

    >>> named_text([("dog", Box(0.0, 0.1, 0.5, 1.0)), ("red pear", Box(0.5, 0.0, 1.0, 1.0))])
    'dog 00 10 50 99, red pear 50 00 99 99'
    """
    return ", ".join(f"{name} {box.to_text()}" for name, box in objects)


def parse_named(text: str) -> list[tuple[str, Box]]:
    """Every box of a text with the words between it and the one before; boxes without any are left out.

    >>> parse_named("dog 00 10 50 99, red pear: 50 00 99 99.")[1]
    ('red pear', Box(left=0.5050505050505051, top=0.0, right=1.0, bottom=1.0))
    """
    found, end = [], 0
    for match in _FOUR.finditer(text):
        name = text[end : match.start()].strip(" \t\n,;:.[(<>)]")
        if name and (boxes := parse_boxes(match.group())):
            found.append((name, boxes[0]))
        end = match.end()
    return found


def iou(a: Box, b: Box) -> float:
    """Area that both cover over the area that at least one of them covers, in [0, 1]; 0 if neither has any.

    Source: Everingham et al. 2010, https://doi.org/10.1007/s11263-009-0275-4, section 4.2.
    """
    shared = Box(max(a.left, b.left), max(a.top, b.top), min(a.right, b.right), min(a.bottom, b.bottom)).area
    either = a.area + b.area - shared
    return shared / either if either > 0 else 0.0


def text_iou(prediction: str, truth: str) -> float:
    """IoU of the first box in each text; 0 if the prediction has none.

    Raises:
        ValueError: the truth has no box.
    """
    expected = parse_boxes(truth)
    if not expected:
        raise ValueError(f"the true answer {truth!r} has no box; give four numbers as Box.to_text writes them")
    return max((iou(box, expected[0]) for box in parse_boxes(prediction)[:1]), default=0.0)


def draw_boxes(
    image: PIL.Image.Image, boxes: Sequence[Box], labels: Sequence[str] | None = None, width: int | None = None
) -> PIL.Image.Image:
    """A copy of the picture with a frame around each box, and its label in the frame's colour at the upper left.

    width: of the frames in pixels; unless given, it grows with the picture.

    Raises:
        ValueError: as many labels as boxes are needed.
    """
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(labels)} labels were given; give one label for each box")
    picture = image.convert("RGB")
    draw = PIL.ImageDraw.Draw(picture)
    width = width or max(1, round(min(picture.size) / 150))
    font = PIL.ImageFont.load_default(max(10.0, min(picture.size) / 25))
    for number, box in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        corners = [min(edge * size, size - 1) for edge, size in zip(box, picture.size * 2, strict=True)]
        draw.rectangle(corners, outline=colour, width=width)
        if labels is not None:
            _write(draw, labels[number], (corners[0], corners[1]), colour, font)
    return picture


def _write(
    draw: PIL.ImageDraw.ImageDraw,
    label: str,
    corner: tuple[float, float],
    colour: str,
    font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont,
) -> None:
    """White words on the frame's colour: above the corner if there is room, else below it; never beyond the right."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    width, height = right - left + 2, bottom - top + 2
    x = max(0.0, min(corner[0], draw.im.size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 1 - left, y + 1 - top), label, fill="white", font=font)
