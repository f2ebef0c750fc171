"""The words for the objects that CHAIR looks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from eyespot.data.formats.records import existing_file
from eyespot.evaluation.scorers.chair import Vocabulary

# Two words with the meaning of one of them, where the other alone has another: a baby bird is no person.
# Source: https://github.com/LisaAnne/Hallucination, utils/chair.py.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
PAIRS = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS} | {
    "passenger jet": "jet",
    "passenger train": "train",
    "toilet seat": "toilet",
}


def make_vocabulary(objects: Iterable[Sequence[str]]) -> Vocabulary:
    """The vocabulary of objects, each a name and perhaps synonyms, and of the pairs of words that mean them.

    Case does not count, and an object may come again.

    Raises:
        ValueError: as ``Vocabulary``.
    """
    names: dict[str, list[str]] = {}
    for name, *synonyms in objects:
        names.setdefault(name.casefold(), []).extend(text.casefold() for text in synonyms)
    meanings = {text: name for name, synonyms in names.items() for text in (name, *synonyms)}
    for pair, word in PAIRS.items():
        if word in meanings and pair not in meanings:
            names[meanings[word]].append(pair)
    return Vocabulary(names)


def read_synonyms(path: str) -> Iterator[list[str]]:
    """The objects of a file with one a line, "name, synonym, synonym".

    Raises:
        ValueError: there is no such file, or it is not UTF-8 text.
    """
    try:
        lines = existing_file(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    for line in lines:
        if texts := [text.strip() for text in line.split(",") if text.strip()]:
            yield texts
