"""What a picture looks like in few numbers: its size, a perceptual hash and coarse colours."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from eyespot.data.sample import ImageSource
from eyespot.processing.images import ImageError, content_hash, open_image


def difference_hash(image: PIL.Image.Image) -> int:
    """64 bits: in 8 rows of 9 grey values, whether each is brighter than its left neighbour (dHash).

    Rescaling, compression and mild changes of brightness flip few bits.
    Source: https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html
    """
    grey = np.asarray(image.convert("L").resize((9, 8), PIL.Image.Resampling.LANCZOS))  # [8, 9]
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def colors(image: PIL.Image.Image) -> NDArray[np.uint8]:
    """The picture in 8 x 8 colours, uint8 [8, 8, 3]; the hash alone would take a red disc for a blue one."""
    return np.asarray(image.convert("RGB").resize((8, 8), PIL.Image.Resampling.BOX))


def color_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean absolute difference as a share of the whole range, from 0 to 1."""
    return float(np.abs(a.astype(np.int16) - b).mean()) / 255


@dataclass(frozen=True)
class Look:
    """What a picture looks like: SHA-256 of its pixels, width and height in pixels, dHash, colours uint8 [8, 8, 3]."""

    content: str
    size: tuple[int, int]
    hash: int
    colors: NDArray[np.uint8] = field(repr=False, compare=False)


class Looks:
    """Pictures to their looks; each file is opened once.

    Attributes:
        num_unreadable: pictures that could not be opened.
    """

    def __init__(self) -> None:
        self.num_unreadable = 0
        self._known: dict[Hashable, Look | str] = {}

    def __call__(self, image: ImageSource) -> Look:
        """Raises ImageError if the picture cannot be opened."""
        if isinstance(image, PIL.Image.Image):
            return self._look(image)  # it may be gone before another one gets its address
        key = hashlib.sha256(image).digest() if isinstance(image, bytes) else image
        if key not in self._known:
            try:
                self._known[key] = self._look(image)
            except ImageError as error:
                self._known[key] = str(error)
        if isinstance(known := self._known[key], str):
            raise ImageError(known)
        return known

    def _look(self, image: ImageSource) -> Look:
        try:
            picture = open_image(image)
        except ImageError:
            self.num_unreadable += 1
            raise
        return Look(content_hash(picture), picture.size, difference_hash(picture), colors(picture))
