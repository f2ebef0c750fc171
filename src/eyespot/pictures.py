"""Pictures that are drawn when somebody looks, so that data made by a program needs no files and no memory."""

from __future__ import annotations

from abc import ABC, abstractmethod

import PIL.Image


class LazyPicture(ABC):
    """A picture given by a few values; subclasses are frozen dataclasses.

    Equal values draw equal pixels, and they compare, hash and pickle by value. So samples about one picture find each
    other, a worker process is sent a few numbers, and features of the picture are found again in another run.
    """

    __slots__ = ()

    @abstractmethod
    def draw(self) -> PIL.Image.Image:
        """A new picture of mode RGB."""
