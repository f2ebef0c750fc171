"""What is left out of the training data, and why.

A filter is a class with a line in `eyespot.registry.FILTERS`; its arguments are those of ``data.filters.NAME``. Every
filter judges a sample before any of them keeps it, so a sample is only ever dropped in favour of one that stays,
whatever the order of the filters.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from eyespot.data.duplicates import HammingIndex, TextIndex, normalized
from eyespot.data.looks import Look, Looks, color_difference
from eyespot.data.sample import LoadReport, Rejected, Sample
from eyespot.data.sources import UNREADABLE, with_progress
from eyespot.processing.images import ImageError


@dataclass(frozen=True)
class Dropped(Rejected):
    """A sample that a filter left out, and the one that stays in its place, if there is one."""

    sample: Sample | None = field(default=None, repr=False)
    twin: Sample | None = field(default=None, repr=False)


class Candidate:
    """A sample as filters see it."""

    def __init__(self, sample: Sample, looks: Looks) -> None:
        self.sample, self._looks = sample, looks

    @cached_property
    def text(self) -> str:
        """Everything that is said."""
        return "\n".join(self.sample.texts)

    @cached_property
    def pictures(self) -> list[Look]:
        """Raises ImageError if one cannot be opened."""
        return [self._looks(image) for image in self.sample.images]

    def dropped(self, reason: str, detail: str = "", twin: Sample | None = None) -> Dropped:
        return Dropped(self.sample.id, reason, detail, self.sample, twin)


class Filter:
    """A reason to leave samples out."""

    def judge(self, candidate: Candidate) -> Dropped | None:
        """Why the sample is to be left out, or None. An ImageError says that a picture cannot be opened."""
        raise NotImplementedError

    def keep(self, candidate: Candidate) -> None:
        """Told of every sample that all filters let pass."""


def apply(filters: Sequence[Filter], samples: Sequence[Sample], report: LoadReport) -> list[Sample]:
    """The samples that every filter lets pass, in their order; the others go into the report as `Dropped`."""
    return list(passing(filters, with_progress(iter(samples), "filtering", len(samples)), report))


def passing(filters: Sequence[Filter], samples: Iterable[Sample], report: LoadReport) -> Iterator[Sample]:
    """The same one by one; nothing is kept but what the filters need."""
    looks = Looks()
    for sample in samples:
        candidate = Candidate(sample, looks)
        dropped = _judged(candidate, filters)
        if dropped is None:
            for each in filters:
                each.keep(candidate)
            yield sample
        else:
            report.accepted -= 1
            report.rejected.append(dropped)


def _judged(candidate: Candidate, filters: Sequence[Filter]) -> Dropped | None:
    try:
        return next((dropped for each in filters if (dropped := each.judge(candidate)) is not None), None)
    except ImageError as error:
        return candidate.dropped(UNREADABLE, str(error))


class TextLength(Filter):
    """Drops samples whose answers or questions are too short or too long.

    What is measured is everything that one side says in the conversation; of several captions, each by itself.

    Args:
        of: "answer" (what the assistant says) or "question" (what the user says).
        min_chars, max_chars: characters, without space at the ends.
        min_words, max_words: what stands between spaces.

    Raises:
        ValueError: a least that is above the most.
    """

    def __init__(
        self,
        *,
        of: Literal["answer", "question"] = "answer",
        min_chars: int = 1,
        max_chars: int | None = None,
        min_words: int = 1,
        max_words: int | None = None,
    ) -> None:
        self.role = {"answer": "assistant", "question": "user"}[of]
        self.of = of
        self.limits = {"characters": (min_chars, max_chars), "words": (min_words, max_words)}
        for unit, (least, most) in self.limits.items():
            if most is not None and most < least:
                raise ValueError(f"{unit} are limited to {least} at least and {most} at most; nothing would pass")

    def judge(self, candidate: Candidate) -> Dropped | None:
        for text in self._texts(candidate.sample):
            for unit, count in (("characters", len(text)), ("words", len(text.split()))):
                least, most = self.limits[unit]
                if count < least:
                    return candidate.dropped(f"{self.of} has fewer than {least} {unit}", f"{count}: {text[:60]!r}")
                if most is not None and count > most:
                    return candidate.dropped(f"{self.of} has more than {most} {unit}", str(count))
        return None

    def _texts(self, sample: Sample) -> list[str]:
        if sample.captions and self.of == "answer":
            return [caption.strip() for caption in sample.captions]
        said = [
            part["text"].strip()
            for message in sample.messages
            if message["role"] == self.role
            for part in message["content"]
            if part["type"] == "text"
        ]
        return ["\n".join(said)]


class Language(Filter):
    """Drops samples that speak another language.

    The languages of short texts are uncertain, so a sample passes unless another language is at least so probable.

    Args:
        allowed: ISO 639-1 codes, such as ["en", "de"].
        min_probability: of the other language, from 0 to 1.

    Raises:
        ImportError: py3langid is not installed.
        ValueError: an unknown code, or a probability out of its range.
    """

    def __init__(self, *, allowed: Sequence[str], min_probability: float = 0.5) -> None:
        if not 0 <= min_probability <= 1:
            raise ValueError(f"min_probability is {min_probability}; give a number from 0 to 1")
        known = sorted(_identifier().labels)
        unknown = [code for code in allowed if code not in known]
        if unknown or not allowed:
            raise ValueError(f"allowed is {list(allowed)}; give one or more of: {', '.join(known)}")
        self.allowed, self.min_probability = list(allowed), min_probability

    def judge(self, candidate: Candidate) -> Dropped | None:
        language, probability = _identifier().classify(candidate.text)
        if language in self.allowed or probability < self.min_probability:
            return None
        return candidate.dropped(f"language is not {' or '.join(self.allowed)}", f"{language}, {probability:.0%}")


@functools.cache
def _identifier() -> Any:
    """Of the libraries that carry their model (no download), it is exact on short texts, repeatable, quick and 5 MB."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError("data filter 'language' needs a package; pip install \"eyespot[filters]\"") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class ReadableImages(Filter):
    """Drops samples with a picture that cannot be opened to the end."""

    def judge(self, candidate: Candidate) -> Dropped | None:
        _ = candidate.pictures
        return None


class ImageSize(Filter):
    """Drops samples with a picture that is tiny or very long.

    Args:
        min_side: least number of pixels of the shorter side.
        max_aspect: most that the longer side may be of the shorter one.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(self, *, min_side: int = 32, max_aspect: float = 5.0) -> None:
        if min_side < 1 or max_aspect < 1:
            raise ValueError(f"min_side is {min_side} and max_aspect is {max_aspect}; both must be 1 or more")
        self.min_side, self.max_aspect = min_side, max_aspect

    def judge(self, candidate: Candidate) -> Dropped | None:
        for width, height in (look.size for look in candidate.pictures):
            shorter, longer = sorted((width, height))
            if shorter < self.min_side:
                return candidate.dropped(f"picture has a side below {self.min_side} pixels", f"{width}x{height}")
            if longer > self.max_aspect * shorter:
                reason = f"picture is more than {self.max_aspect:g} times as long as wide"
                return candidate.dropped(reason, f"{width}x{height}")
        return None


class DuplicateImages(Filter):
    """Drops samples with a picture that looks like one that was kept, and is not the same.

    The same picture may be asked about as often as one likes, also from another file; what is dropped are copies of
    other size or quality. They differ in few bits of the perceptual hash and in their colours little.

    Args:
        max_distance: bits of 64.
        max_difference: mean difference of colours as a share of their whole range.

    Raises:
        ValueError: a limit out of its range.
    """

    def __init__(self, *, max_distance: int = 4, max_difference: float = 0.02) -> None:
        if not 0 <= max_difference <= 1:
            raise ValueError(f"max_difference is {max_difference}; give a number from 0 to 1")
        self.max_difference = max_difference
        self.index = HammingIndex(max_distance)
        self.owners: list[tuple[Look, Sample]] = []  # by their place in the index
        self._contents: set[str] = set()

    def judge(self, candidate: Candidate) -> Dropped | None:
        for look in candidate.pictures:
            if look.content in self._contents:
                continue
            for distance, place in self.index.near(look.hash):
                other, owner = self.owners[place]
                difference = color_difference(look.colors, other.colors)
                if difference <= self.max_difference:
                    detail = f"like that of {owner.id}, {distance} bits and {difference:.1%} of colour apart"
                    return candidate.dropped("picture nearly equals another", detail, owner)
        return None

    def keep(self, candidate: Candidate) -> None:
        for look in candidate.pictures:
            if look.content not in self._contents:
                self._contents.add(look.content)
                self.index.add(look.hash)
                self.owners.append((look, candidate.sample))


class DuplicateTexts(Filter):
    """Drops samples that say nearly the same as one that was kept.

    Args:
        min_similarity: share of common pieces of 5 letters among all pieces of both texts (Jaccard).
        within: "picture" compares what is said about the same pictures, "all" everything; data sets that ask the same
            of many pictures need "picture".

    Raises:
        ValueError: a similarity out of its range.
    """

    def __init__(self, *, min_similarity: float = 0.9, within: Literal["picture", "all"] = "picture") -> None:
        self.index = TextIndex(min_similarity)
        self.within = within
        self.owners: list[Sample] = []  # by their place in the index

    def _scope(self, candidate: Candidate) -> Hashable:
        return tuple(look.content for look in candidate.pictures) if self.within == "picture" else None

    def judge(self, candidate: Candidate) -> Dropped | None:
        found = self.index.nearest(normalized(candidate.text), self._scope(candidate))
        if found is None:
            return None
        similarity, place = found
        owner = self.owners[place]
        return candidate.dropped("text nearly equals another", f"like that of {owner.id}, {similarity:.0%}", owner)

    def keep(self, candidate: Candidate) -> None:
        self.index.add(normalized(candidate.text), self._scope(candidate))
        self.owners.append(candidate.sample)
