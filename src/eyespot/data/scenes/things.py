"""What scenes are made of: characters of the OpenMoji font, named in fourteen languages by the package `emoji`.

All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project, license CC BY-SA 4.0.
The package `emoji` is BSD-3-Clause; the names in it are those of Unicode's CLDR.
"""

from __future__ import annotations

import functools
from types import ModuleType

from eyespot.data.scenes.drawing import has_glyph
from eyespot.registry import closest

# Ordered by theme: things that stand beside each other here are drawn together more often.
FREQUENT = (
    "dog face", "cat face", "rabbit face", "pig face", "cow face", "lion", "panda", "elephant", "penguin", "owl",
    "duck", "frog", "turtle", "tropical fish", "butterfly", "snail", "mushroom", "sunflower", "carrot", "pineapple",
    "strawberry", "red apple", "pear", "lemon", "banana", "pizza", "hamburger", "doughnut", "birthday cake",
    "wrapped gift", "balloon", "crown", "bell", "guitar", "camera", "alarm clock", "key", "hammer", "chair", "umbrella",
    "house", "snowman", "bicycle", "automobile", "bus", "tractor", "sailboat", "helicopter", "airplane", "rocket",
)  # fmt: skip
_VARIATION = "\ufe0f"  # asks for a colourful picture in place of a sign of the text
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = (
    *(f"{colour} {shape}" for shape in ("circle", "square", "heart") for colour in _COLOURS),
    "brown circle", "brown square", "star", "red triangle pointed up",
)  # fmt: skip


def things(objects: str | int | list[str], language: str = "en") -> dict[str, str]:
    """Characters and their names, in an order in which neighbours belong together.

    Args:
        objects: "frequent" (50 things and 22 plain shapes), "shapes", "all" (what the font draws and the package
            names: more than 1,300), a number (so many of the frequent ones, evenly chosen), or a list of English names.
        language: a code that the package `emoji` knows: en, es, ja, ko, pt, it, fr, de, fa, id, zh, ru, tr or ar.

    Raises:
        ImportError: a package is missing.
        ValueError: unknown word, language or name, or a number beyond the frequent ones.
    """
    emoji = _emoji()
    if language not in emoji.LANGUAGES:
        choices = sorted(emoji.LANGUAGES)
        raise ValueError(f"unknown language {language!r}{closest(language, choices)} (choices: {', '.join(choices)})")
    characters = _characters()
    names = _chosen(objects, list(characters))
    if language != "en":
        emoji.config.load_language(language)
    return {characters[name]: _name(_entry(emoji, characters[name])[language]) for name in names}


def _chosen(objects: str | int | list[str], known: list[str]) -> list[str]:
    words = {"frequent": [*FREQUENT, *SHAPES], "shapes": list(SHAPES), "all": known}
    if isinstance(objects, str):
        if objects not in words:
            hint = closest(objects, list(words))
            raise ValueError(f"objects={objects!r}{hint} (choices: {', '.join(words)}, a number, or a list of names)")
        return words[objects]
    if isinstance(objects, int):
        frequent = words["frequent"]
        if not 0 < objects <= len(frequent):
            raise ValueError(f"objects={objects}, but there are {len(frequent)} frequent ones; give fewer, or 'all'")
        return [frequent[i * len(frequent) // objects] for i in range(objects)]
    for name in objects:
        if name not in known:
            raise ValueError(f"no object is called {name!r}{closest(str(name), known)}; names are English")
    return list(dict.fromkeys(objects))


@functools.cache
def _characters() -> dict[str, str]:
    """English name -> character, for all single characters that the font draws, in the order of Unicode."""
    emoji = _emoji()
    named = {}
    for text, entry in emoji.EMOJI_DATA.items():
        char = text.removesuffix(_VARIATION)
        if entry["status"] == emoji.STATUS["fully_qualified"] and len(char) == 1 and has_glyph(char):
            named[_name(entry["en"])] = char
    return dict(sorted(named.items(), key=lambda item: item[1]))


def _entry(emoji: ModuleType, char: str) -> dict[str, str]:
    found: dict[str, str] = emoji.EMOJI_DATA.get(char + _VARIATION) or emoji.EMOJI_DATA[char]
    return found


def _name(text: str) -> str:
    """The words of ":red_apple:"."""
    return text.strip(":").replace("_", " ")


def _emoji() -> ModuleType:
    try:
        import emoji
    except ImportError as error:
        raise ImportError("data format 'scenes' needs a package; pip install \"eyespot[scenes]\"") from error
    return emoji
