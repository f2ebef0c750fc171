"""How a training picture, and what is said about it, may differ from visit to visit.

An augmentation is a class with a line in `eyespot.registry.AUGMENTATIONS`; its arguments are those of
``data.augment.NAME``. None of them resizes: the image processor does it afterwards, as it always does.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import ClassVar

import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

from eyespot.processing.mirror import check_languages, mirrored

_COLORS = (
    "red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ae]y|beige|gold(?:en)?|silver|tan|teal|"
    "turquoise|cyan|magenta|maroon|navy"
)
KINDS = {
    "position": re.compile(
        r"\b(?:where|left\w*|right\w*|top|bottom|corner|cent(?:er|re)|middle|above|below|beneath|under(?:neath)?|"
        r"behind|between|beside|next to|in front of|position\w*|locat\w+|edge|border|background|foreground|"
        r"near(?:est|er)?|close(?:st|r)?|far(?:thest|ther)?)\b",
        re.IGNORECASE,
    ),
    "count": re.compile(r"\b(?:how many|how much|number of|count\w*|how often)\b", re.IGNORECASE),
    "writing": re.compile(
        r"\b(?:texts?|reads?|reading|writ(?:es|ten|ing)|says?|letters?|words?|signs?|spell\w*|labels?|logos?|brands?|"
        r"titles?|digits?|numbers?(?! of)|clocks?|what time|license plates?)\b",
        re.IGNORECASE,
    ),
    "color": re.compile(rf"\b(?:colou?r\w*|{_COLORS})\b", re.IGNORECASE),
}
"""What a text is about, as English words tell; ``spare`` names these kinds."""


class Augmentation:
    """A random change of pictures, and of what is said about them if that has to change as well.

    Args:
        spare: kinds of texts, by their names in KINDS; where one is spoken of, nothing is changed.

    Attributes:
        moves: whether things change their places, so that coordinates in a text would have to as well.

    Raises:
        ValueError: an unknown kind.
    """

    moves: ClassVar[bool] = False

    def __init__(self, spare: Sequence[str] = ()) -> None:
        if unknown := [kind for kind in spare if kind not in KINDS]:
            raise ValueError(f"spare names {unknown[0]!r}; choices: {', '.join(KINDS)}")
        self.spare = tuple(spare)

    def reason_against(self, texts: Sequence[str], num_images: int) -> str:
        """Why pictures with these texts are left as they are, or ""."""
        spoken = (kind for kind in self.spare if any(KINDS[kind].search(text) for text in texts))
        return next((f"speaks of {kind}" for kind in spoken), "")

    def chosen(self, rng: random.Random) -> bool:
        """Whether this visit is changed."""
        return True

    def picture(self, image: PIL.Image.Image, rng: random.Random) -> PIL.Image.Image:
        """RGB image [H, W] to RGB image, of another size perhaps."""
        raise NotImplementedError

    def text(self, text: str) -> str:
        """What is said about the changed picture."""
        return text

    def box(self, edges: tuple[float, float, float, float]) -> tuple[float, float, float, float] | None:
        """Where a box (left, top, right, bottom as shares of the sides) lies afterwards; None if it is not followed."""
        return None if self.moves else edges


class Crop(Augmentation):
    """A part of the picture, which the image processor then brings to its own size (a random resized crop).

    Unlike in torchvision the ratio is relative to the picture's own shape, so that a crop of any picture is possible
    and a panorama stays one. Source: arXiv:1409.4842, section 6.

    Args:
        scale: least and most share of the area.
        ratio: least and most factor by which width / height changes.
        spare: see Augmentation; what is where, and how many there are, changes when an edge is cut off.

    Raises:
        ValueError: a range that is not ascending, a scale that is not above 0 and at most 1, or a ratio not above 0.
    """

    moves = True

    def __init__(
        self,
        *,
        scale: Sequence[float] = (0.7, 1.0),
        ratio: Sequence[float] = (0.8, 1.25),
        spare: Sequence[str] = ("position", "count"),
    ) -> None:
        super().__init__(spare)
        for name, values in (("scale", scale), ("ratio", ratio)):
            if len(values) != 2 or not 0 < values[0] <= values[1]:
                raise ValueError(f"{name} is {list(values)}; give two numbers above 0, the smaller one first")
        if scale[1] > 1:
            raise ValueError(f"scale is {list(scale)}; a crop has at most the whole area, which is 1")
        self.scale, self.ratio = tuple(scale), tuple(ratio)

    def picture(self, image: PIL.Image.Image, rng: random.Random) -> PIL.Image.Image:
        area = rng.uniform(*self.scale)
        ratio = math.exp(rng.uniform(*map(math.log, self.ratio)))
        across = max(area, min(1.0, math.sqrt(area * ratio)))  # share of the width; that of the height is at most 1
        width = max(1, round(image.width * across))
        height = max(1, round(image.height * area / across))
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        return image.crop((left, top, left + width, top + height))


class Flip(Augmentation):
    """The picture in a mirror, with left and right exchanged in questions, answers and boxes.

    A picture stays as it is where a text uses such a word in a sense that may be none of side, and where several
    pictures stand together, because their order is then spoken of as well.

    Args:
        probability: of the mirror image, from 0 to 1.
        languages: whose words for left and right are known; see `eyespot.processing.mirror.SIDES`.
        spare: see Augmentation; writing in a picture cannot be read in a mirror.

    Raises:
        ValueError: a probability out of its range, or an unknown language.
    """

    moves = True

    def __init__(
        self,
        *,
        probability: float = 0.5,
        languages: Sequence[str] = ("en",),
        spare: Sequence[str] = ("writing",),
    ) -> None:
        super().__init__(spare)
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}; give a number from 0 to 1")
        check_languages(languages)
        self.probability, self.languages = probability, tuple(languages)

    def reason_against(self, texts: Sequence[str], num_images: int) -> str:
        if num_images > 1:
            return "has several pictures"
        if any(mirrored(text, self.languages) is None for text in texts):
            return "says left or right in an uncertain sense"
        return super().reason_against(texts, num_images)

    def chosen(self, rng: random.Random) -> bool:
        return rng.random() < self.probability

    def picture(self, image: PIL.Image.Image, rng: random.Random) -> PIL.Image.Image:
        return PIL.ImageOps.mirror(image)

    def text(self, text: str) -> str:
        exchanged = mirrored(text, self.languages)
        if exchanged is None:
            raise ValueError(f"{text[:80]!r} says left or right in an uncertain sense; ask reason_against first")
        return exchanged

    def box(self, edges: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        left, top, right, bottom = edges
        return 1 - right, top, 1 - left, bottom


class Color(Augmentation):
    """Another brightness, contrast and saturation, each multiplied by a factor from 1 - x to 1 + x.

    Args:
        brightness, contrast, saturation: x, from 0 to 1.
        spare: see Augmentation.

    Raises:
        ValueError: an x out of its range.
    """

    def __init__(
        self,
        *,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        spare: Sequence[str] = (),
    ) -> None:
        super().__init__(spare)
        self.spans = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, span in self.spans.items():
            if not 0 <= span <= 1:
                raise ValueError(f"{name} is {span}; give a number from 0 to 1")

    def picture(self, image: PIL.Image.Image, rng: random.Random) -> PIL.Image.Image:
        enhancers = (PIL.ImageEnhance.Brightness, PIL.ImageEnhance.Contrast, PIL.ImageEnhance.Color)
        for enhancer, span in zip(enhancers, self.spans.values(), strict=True):
            image = enhancer(image).enhance(rng.uniform(1 - span, 1 + span))
        return image


class Hue(Augmentation):
    """All colours turned on the colour circle.

    Args:
        turn: most of the turn to either side, as a share of the circle, from 0 to 0.5; 1/6 makes red yellow.
        spare: see Augmentation; where colours are spoken of they must stay.

    Raises:
        ValueError: a turn out of its range.
    """

    def __init__(self, *, turn: float = 0.05, spare: Sequence[str] = ("color",)) -> None:
        super().__init__(spare)
        if not 0 <= turn <= 0.5:
            raise ValueError(f"turn is {turn}; give a number from 0 to 0.5")
        self.turn = turn

    def picture(self, image: PIL.Image.Image, rng: random.Random) -> PIL.Image.Image:
        steps = round(256 * rng.uniform(-self.turn, self.turn))
        hue, saturation, value = image.convert("HSV").split()
        turned = hue.point([(tone + steps) % 256 for tone in range(256)])
        return PIL.Image.merge("HSV", (turned, saturation, value)).convert("RGB")
