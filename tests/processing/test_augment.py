"""What augmentations do to a picture and to what is said about it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eyespot.config import ConfigError, build_parts
from eyespot.processing.augment import KINDS, Augmentation, Color, Crop, Flip, Hue
from eyespot.processing.mirror import SIDES, check_languages, mirrored
from eyespot.registry import AUGMENTATIONS


def places(width: int = 120, height: int = 80) -> Image.Image:
    """A picture whose red and green say where a pixel was: column and row."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns, rows, rows * 0], axis=-1).astype(np.uint8))


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"corp": {}}, "unknown augmentation 'corp'; did you mean 'crop'?"),
        ({"crop": {"scales": [1, 1]}}, "augmentation 'crop' takes no argument 'scales'; did you mean 'scale'?"),
        ({"crop": {"scale": 0.5}}, "data.augment.crop.scale is 0.5 (float)"),
        ({"crop": {"scale": [0.9, 0.5]}}, "scale is [0.9, 0.5]; give two numbers above 0, the smaller one first"),
        ({"crop": {"scale": [0.5, 1.5]}}, "scale is [0.5, 1.5]; a crop has at most the whole area, which is 1"),
        ({"crop": {"ratio": [0.5, 1, 2]}}, "ratio is [0.5, 1, 2]; give two numbers"),
        ({"crop": {"spare": ["text"]}}, "spare names 'text'; choices: position, count, writing, color"),
        ({"flip": {"probability": 1.1}}, "probability is 1.1; give a number from 0 to 1"),
        ({"flip": {"languages": ["en", "xx"]}}, "language 'xx' has no words for left and right here; choices: en, de"),
        ({"color": {"contrast": 2}}, "contrast is 2; give a number from 0 to 1"),
        ({"hue": {"turn": 0.6}}, "turn is 0.6; give a number from 0 to 0.5"),
        ({"hue": None}, "data.augment.hue is None; give its arguments, or {} for the defaults"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_parts(AUGMENTATIONS, given, "data.augment")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_every_augmentation_is_a_function_of_picture_and_random_numbers(name: str) -> None:
    augmentation = AUGMENTATIONS[name]()
    image = photo()
    before = image.tobytes()
    changed = [augmentation.picture(image, random.Random(seed)) for seed in (1, 1, 2)]
    assert image.tobytes() == before
    assert changed[0].tobytes() == changed[1].tobytes() != before
    assert (changed[0].tobytes() == changed[2].tobytes()) == (name == "flip")  # a mirror has one image
    assert all(picture.mode == "RGB" for picture in changed)
    assert augmentation.text("what is it?") == "what is it?"
    for size in ((1, 1), (1, 300), (300, 1)):
        assert min(augmentation.picture(Image.new("RGB", size), random.Random(0)).size) >= 1


@given(st.integers(0, 10**6), st.floats(0.2, 1), st.floats(0.2, 1), st.integers(20, 400), st.integers(20, 400))
@settings(max_examples=80, deadline=None)
def test_a_crop_keeps_its_ranges(seed: int, first: float, second: float, width: int, height: int) -> None:
    scale = sorted((first, second))
    crop = Crop(scale=scale, ratio=(0.8, 1.25)).picture(Image.new("RGB", (width, height)), random.Random(seed))
    # a side is rounded to whole pixels
    slack = 0.5 / width + 0.5 / height
    across, down = crop.width / width, crop.height / height
    assert scale[0] - slack <= across * down <= scale[1] + slack
    assert 0.8 - 4 * slack <= across / down <= 1.25 + 4 * slack


def test_a_crop_is_a_part_of_the_picture() -> None:
    seen = set()
    for seed in range(30):
        part = pixels(Crop(scale=(0.3, 0.6)).picture(places(), random.Random(seed)))
        left, top = part[0, 0, :2]
        height, width = part.shape[:2]
        assert (part == pixels(places())[top : top + height, left : left + width]).all()
        seen.add((left, top, width, height))
    assert len(seen) == 30
    assert Crop(scale=(1, 1), ratio=(1, 1)).picture(places(), random.Random(0)).tobytes() == places().tobytes()


def test_a_flip_is_the_mirror_image() -> None:
    flip = Flip()
    assert (pixels(flip.picture(places(), random.Random(0))) == pixels(places())[:, ::-1]).all()
    assert flip.box((0.1, 0.2, 0.4, 0.8)) == pytest.approx((0.6, 0.2, 0.9, 0.8))
    assert Crop().box((0, 0, 1, 1)) is None and Color().box((0, 0, 1, 1)) == (0, 0, 1, 1)
    rng = random.Random(0)
    assert sum(Flip(probability=0.3).chosen(rng) for _ in range(2000)) == pytest.approx(600, abs=60)
    assert not Flip(probability=0).chosen(rng) and Flip(probability=1).chosen(rng) and Crop().chosen(rng)


def test_colours_stay_within_their_spans() -> None:
    assert (
        Color(brightness=0, contrast=0, saturation=0).picture(photo(), random.Random(0)).tobytes() == photo().tobytes()
    )
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    levels = [
        pixels(Color(brightness=0.3, contrast=0, saturation=1).picture(grey, random.Random(seed)))[0, 0]
        for seed in range(200)
    ]
    assert all(len(set(level)) == 1 for level in levels)  # grey has no saturation to change
    assert 69 <= min(level[0] for level in levels) < 75 and 125 < max(level[0] for level in levels) <= 130
    mild = Image.new("RGB", (8, 8), (120, 100, 100))
    spreads = [
        int(np.ptp(pixels(Color(brightness=0, contrast=0, saturation=0.5).picture(mild, random.Random(seed)))))
        for seed in range(200)
    ]
    assert 9 <= min(spreads) <= 12 and 28 <= max(spreads) <= 31


class Turned(random.Random):
    """Draws the end of every range."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_hue_turns_colours() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    turned = pixels(Hue(turn=1 / 3).picture(red, Turned()))[0, 0]
    assert turned[1] > 250 and turned[0] < 12 and turned[2] < 12  # green, a third of the circle away
    rounded = np.abs(pixels(Hue(turn=0).picture(photo(), random.Random(0))) - pixels(photo()))
    assert rounded.max() <= 8 and rounded.mean() < 1  # HSV has 256 hues


@pytest.mark.parametrize(
    ("kind", "speaks", "silent"),
    [
        ("position", "Where is the cat?", "What is the cat doing?"),
        ("position", "the man on the left", "a bright light"),
        ("count", "How many dogs are there?", "Is it a dog?"),
        ("writing", "What does the sign say?", "How many dogs? The number of dogs is two"),
        ("writing", "What brand is the car?", "Which way is she facing?"),
        ("color", "What colour is it?", "a tired man"),
        ("color", "a red bus", "a bus"),
    ],
)
def test_kinds_of_texts(kind: str, speaks: str, silent: str) -> None:
    assert KINDS[kind].search(speaks) and not KINDS[kind].search(silent)
    augmentation = Augmentation(spare=[kind])
    assert augmentation.reason_against([silent, speaks.upper()], 1) == f"speaks of {kind}"
    assert augmentation.reason_against([silent], 1) == "" and Augmentation().reason_against([speaks], 1) == ""


def test_defaults_spare_what_a_change_would_make_wrong() -> None:
    assert Crop().reason_against(["Where is it?"], 1) and Crop().reason_against(["How many are there?"], 1)
    assert Crop(spare=[]).reason_against(["Where is it?"], 1) == ""
    assert Flip().reason_against(["What is written there?"], 1) == "speaks of writing"
    assert Flip().reason_against(["Is that right?"], 1) == "says left or right in an uncertain sense"
    assert Flip().reason_against(["the same?"], 2) == "has several pictures"
    assert Flip().reason_against(["on the left?", "left"], 1) == ""
    assert Hue().reason_against(["a red bus"], 1) and not Color().reason_against(["a red bus"], 1)
    with pytest.raises(ValueError, match="'all right' says left or right in an uncertain sense"):
        Flip().text("all right")


# --- words ----------------------------------------------------------------------------------------------------------

EXCHANGED = [
    ("en", "What is to the left of the cup?", "What is to the right of the cup?"),
    ("en", "on the right side", "on the left side"),
    ("en", "Left", "Right"),
    ("en", "right.", "left."),
    ("en", "the LEFT hand", "the RIGHT hand"),
    ("en", "Left-hand side", "Right-hand side"),
    ("en", "upper left corner, top-right", "upper right corner, top-left"),
    ("en", "turn left", "turn right"),
    ("en", "is the dog left or right of the cat?", "is the dog right or left of the cat?"),
    ("en", "The rightmost cup, second from the left", "The leftmost cup, second from the right"),
    ("en", "to his left there is a dog", "to his right there is a dog"),
    ("en", "a man on the left wearing a hat", "a man on the right wearing a hat"),
    ("en", "in the middle left of the picture", "in the middle right of the picture"),
    ("en", "from left to right", "from right to left"),
    ("en", "turning clockwise", "turning counterclockwise"),
    ("en", "copyright, upright, bright, cleft", "copyright, upright, bright, cleft"),
    ("en", "no side is named", "no side is named"),
    ("de", "Links neben der linken Tasse, rechts ein Rechteck", "Rechts neben der rechten Tasse, links ein Rechteck"),
    ("nl", "aan de linkerkant, rechtsboven", "aan de rechterkant, linksboven"),
    ("fr", "À gauche de la table, à droite", "À droite de la table, à gauche"),
    ("es", "a la izquierda", "a la derecha"),
    ("it", "a destra", "a sinistra"),
    ("pt", "à esquerda", "à direita"),
    ("zh", "猫在左边", "猫在右边"),
    ("ja", "猫は右にいる", "猫は左にいる"),
]
UNCERTAIN = [
    ("en", "Is that right?"),
    ("en", "He left the room"),
    ("en", "What is left on the plate?"),
    ("en", "right now"),
    ("en", "all right"),
    ("en", "Right, so it is a cat"),
    ("en", "Who has the right of way?"),
    ("en", "The right answer is yes"),
    ("en", "the right bowl"),
    ("en", "looking right at the camera"),
    ("en", "leftovers in a box"),
    ("en", "human rights"),
    ("en", "right side up"),
    ("en", "anticlockwise"),
    ("de", "die Rechte der Kinder"),
    ("nl", "de rechtbank, rechtsom"),
    ("fr", "le bras gauche"),
    ("fr", "tout droit"),
    ("es", "todo derecho"),
    ("it", "il braccio sinistro"),
    ("pt", "o direito"),
    ("zh", "十个左右"),
]


@pytest.mark.parametrize(("language", "text", "wanted"), EXCHANGED)
def test_words_for_sides_are_exchanged(language: str, text: str, wanted: str) -> None:
    assert mirrored(text, [language]) == wanted
    assert mirrored(wanted, [language]) == text


@pytest.mark.parametrize(("language", "text"), UNCERTAIN)
def test_a_word_that_may_be_no_side_makes_a_text_uncertain(language: str, text: str) -> None:
    assert mirrored(text, [language]) is None


def test_languages_are_used_together_and_only_when_named() -> None:
    assert mirrored("on the left, links, 左", list(SIDES)) == "on the right, rechts, 右"
    assert mirrored("links to the page") == "links to the page"  # German's word for left
    check_languages(list(SIDES))
    assert {language for language, *_ in EXCHANGED} == set(SIDES)


@given(st.lists(st.sampled_from(["on the left", "to the right of it", "Leftmost", "a CAT", "the right eye", "."])))
def test_twice_mirrored_is_the_same(parts: list[str]) -> None:
    text = " ".join(f"{part}." for part in parts)
    once = mirrored(text)
    assert once is not None and mirrored(once) == text
    assert once.count("eft") == text.count("ight")
