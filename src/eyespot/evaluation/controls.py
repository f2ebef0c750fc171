"""What a score is worth without the picture: the picture removed, exchanged for another, or never there at all."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eyespot.data.sample import Sample
from eyespot.data.sample import blind as blind  # training removes pictures, too
from eyespot.evaluation.metrics import normalize_answer
from eyespot.pictures import LazyPicture


def shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The samples in their order, each with the images of another group (picture) and as many as it had.

    The groups are put on one random circle and each takes the images of the next: a permutation without fixed point,
    and every picture is used by one other group. A sample with more images than the next group has goes on around the
    circle. Samples without images are returned unchanged. The other picture may still happen to hold the same answer,
    so the score of this control is the chance level of the data, not zero.
    Source: Sattolo 1986, https://doi.org/10.1016/0020-0190(86)90073-6 (random permutations of one cycle).

    Raises:
        ValueError: the samples with images are all of one group, or no other group has an image of a sample's own.
    """
    pictures = _pictures_by_group(samples)
    if len(pictures) == 1:
        raise ValueError(
            f"all images belong to the one group {next(iter(pictures))!r}, shuffling needs at least 2; "
            "add samples of other pictures or leave the shuffled control out"
        )
    circle = list(pictures)
    random.Random(seed).shuffle(circle)
    place = {group: number for number, group in enumerate(circle)}
    return [_exchanged(sample, pictures, circle, place) if sample.images else sample for sample in samples]


def majority(samples: Sequence[Sample], reference: Sequence[Sample] | None = None) -> list[str]:
    """For every sample the answer that is right most often for its words, in the reference samples.

    Without a reference the samples' own answers are counted. That is an oracle: no function of the words alone, however
    clever, reaches a higher exact-match score on these samples, because the best fixed answer for each text was chosen
    with the solutions in hand. With training samples as the reference it is an honest text-only guesser instead; words
    it never saw get the most frequent answer of all. Ties go to the answer met first.

    Raises:
        ValueError: the reference holds no answer.
    """
    counted = samples if reference is None else reference
    votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for sample in counted:
        # A sample with several accepted answers is won by any of them, but only once by each.
        accepted = list(dict.fromkeys(normalize_answer(answer) for answer in sample.answers))
        votes[prompt_key(blind(sample))].update(accepted)
        overall.update(accepted)
    if not overall:
        raise ValueError(f"{len(counted)} reference samples hold 0 answers; give samples with answers")
    return [(votes.get(prompt_key(blind(sample))) or overall).most_common(1)[0][0] for sample in samples]


def prompt_key(sample: Sample) -> str:
    """One text for everything that is said before the answer: equal texts are equal prompts."""
    return json.dumps(sample.messages[:-1], sort_keys=True, ensure_ascii=False)


def image_key(image: object) -> Hashable:
    """A key under which equal images are found again while the samples live.

    Paths, addresses, bytes and pictures to be drawn are compared by value; opened pictures and arrays by identity,
    which never takes two different pictures for one.
    """
    return image if isinstance(image, (str, bytes, Path, LazyPicture)) else (type(image), id(image))


def _pictures_by_group(samples: Sequence[Sample]) -> dict[str, dict[Hashable, Any]]:
    """Group -> its distinct images by key, in order of appearance; groups without an image are left out."""
    pictures: dict[str, dict[Hashable, Any]] = {}
    for sample in samples:
        for image in sample.images:
            pictures.setdefault(sample.group, {}).setdefault(image_key(image), image)
    return pictures


def _exchanged(
    sample: Sample, pictures: Mapping[str, Mapping[Hashable, Any]], circle: Sequence[str], place: Mapping[str, int]
) -> Sample:
    own = {image_key(image) for image in sample.images}
    others = _others(sample.group, own, pictures, circle, place)
    if not others:
        raise ValueError(
            f"sample {sample.id!r} shares all its images with every other group, so no other picture is left; "
            "let group name the picture or leave the shuffled control out"
        )
    images = tuple(others[number % len(others)] for number in range(len(sample.images)))
    return replace(sample, images=images)


def _others(
    group: str,
    own: set[Hashable],
    pictures: Mapping[str, Mapping[Hashable, Any]],
    circle: Sequence[str],
    place: Mapping[str, int],
) -> list[Any]:
    """As many images of the groups after this one on the circle as the sample has, fewer if there are not so many."""

    def around() -> Iterator[Any]:
        for step in range(1, len(circle)):
            donor = circle[(place[group] + step) % len(circle)]
            yield from (image for key, image in pictures[donor].items() if key not in own)

    return [image for image, _ in zip(around(), own, strict=False)]
