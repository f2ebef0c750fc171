"""Questions about a scene, with answers that follow from its truth and from nothing else.

Each kind of question is a function of the scene that returns a question, or None where it cannot be asked fairly. Fair
means that the words alone tell nothing: a yes/no question is asked only where both answers could have been asked about
things that differ in nothing but what they are (`Cast.stand_ins`), and then a coin decides. A thing that is pointed at
("the dog") occurs once. One side of another ("left of") means that the centres of what is visible lie at least a fifth
of the picture apart.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from eyespot.data import wording
from eyespot.data.boxes import named_text
from eyespot.data.scenes.cast import Cast
from eyespot.data.scenes.scene import Scene, SceneObject
from eyespot.data.wording import Noun

MIN_APART = 0.2
# By the axis of the picture; the smaller coordinate comes first.
SIDES = (("left", "right"), ("above", "below"))
RELATIONS = (("left of", "right of"), ("above", "below"))

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Question:
    """A question with its answers; the first one is learnt, the others are as good."""

    text: str
    answers: tuple[str, ...]


@dataclass
class Asker:
    """A scene and what is needed to ask about it.

    counted: the character that may be counted, if any. nouns: by character. asked: what questions were about already.
    """

    scene: Scene
    cast: Cast
    counted: str | None
    nouns: Mapping[str, Noun]
    rng: random.Random
    asked: set[Hashable] = field(default_factory=set)

    @property
    def subjects(self) -> frozenset[str]:
        return self.cast.subjects

    def __post_init__(self) -> None:
        self.chars = [thing.char for thing in self.scene.objects]
        self.present = set(self.chars)
        self.once = self.scene.once()

    def ask(self, kinds: Sequence[str]) -> Iterator[tuple[str, Question]]:
        """Kind and question, of the kinds that this scene allows; a kind that comes twice is about something else."""
        for kind in kinds:
            question = KINDS[kind](self)
            if question is not None:
                yield kind, question

    def pick(self, choices: Sequence[T]) -> T | None:
        """One that no question was about, or None; it counts as asked from now on."""
        left = [choice for choice in choices if choice not in self.asked]
        if not left:
            return None
        chosen = self.rng.choice(left)
        self.asked.add(chosen)
        return chosen

    def coin(self) -> bool:
        return self.rng.random() < 0.5

    def noun(self, index: int) -> Noun:
        return self.nouns[self.chars[index]]

    def pairs(self) -> list[tuple[int, int]]:
        """Ordered pairs of things that occur once, at least one of them a subject."""
        return [
            (i, j)
            for i in self.once
            for j in self.once
            if i != j and (self.chars[i] in self.subjects or self.chars[j] in self.subjects)
        ]

    def absent_twins(self, char: str) -> list[str]:
        known = self.present | self.asked
        return [twin for twin in self.cast.stand_ins(char) if twin not in known]

    def present_twins(self, char: str) -> list[str]:
        return [twin for twin in self.cast.stand_ins(char) if twin in self.present and twin not in self.asked]


def presence_random(asker: Asker) -> Question | None:
    """Is there a X? X is there, or it is any other thing."""
    return _presence(asker, asker.subjects)


def presence_popular(asker: Asker) -> Question | None:
    """Is there a X? X is there or not, and one of the things that are drawn often."""
    return _presence(asker, asker.subjects & asker.cast.popular)


def _presence(asker: Asker, among: frozenset[str]) -> Question | None:
    char = asker.pick([char for char in sorted(asker.present & among) if asker.absent_twins(char)])
    if char is None:
        return None
    if asker.coin():
        return _is_there(asker, char, "yes")
    return _is_there(asker, asker.pick(asker.absent_twins(char)), "no")


def presence_adversarial(asker: Asker) -> Question | None:
    """Is there a X? X is there, or it is a thing that is often drawn beside one that is there."""
    beside = {near for char in asker.present for near in asker.cast.related(char)} - asker.present
    char = asker.pick([char for char in sorted(beside & asker.subjects) if asker.present_twins(char)])
    if char is None:
        return None
    if asker.coin():
        return _is_there(asker, asker.pick(asker.present_twins(char)), "yes")
    return _is_there(asker, char, "no")


def _is_there(asker: Asker, char: str | None, answer: str) -> Question:
    assert char is not None
    return Question(wording.presence_question(asker.nouns[char]), (answer,))


def count(asker: Asker) -> Question | None:
    """How many X are there? 1 to 5, each as often as the others."""
    if asker.counted is None or asker.pick(["count"]) is None:
        return None
    number = asker.chars.count(asker.counted)
    return Question(wording.count_question(asker.nouns[asker.counted]), (str(number),))


def _apart(asker: Asker, kind: str) -> tuple[int, int, int, int] | None:
    """Two things i and j, an axis along which they lie apart, and the side of j on which i is: 0 is the smaller."""
    centres = [thing.box.centre for thing in asker.scene.objects]
    gaps = [(i, j, axis, centres[i][axis] - centres[j][axis]) for i, j in asker.pairs() for axis in (0, 1)]
    chosen = asker.pick([(kind, i, j, axis, int(gap > 0)) for i, j, axis, gap in gaps if abs(gap) >= MIN_APART])
    return None if chosen is None else chosen[1:]


def relation(asker: Asker) -> Question | None:
    """Is X left of, right of, above or below Y?"""
    chosen = _apart(asker, "relation")
    if chosen is None:
        return None
    i, j, axis, side = chosen
    answer = asker.coin()
    named = RELATIONS[axis][side if answer else 1 - side]
    return Question(wording.relation_question(asker.noun(i), named, asker.noun(j)), ("yes" if answer else "no",))


def which_side(asker: Asker) -> Question | None:
    """Is X left or right of Y? Is X above or below Y?"""
    chosen = _apart(asker, "side")
    if chosen is None:
        return None
    i, j, axis, side = chosen
    return Question(wording.side_question(asker.noun(i), SIDES[axis], asker.noun(j)), (SIDES[axis][side],))


def behind(asker: Asker) -> Question | None:
    """Is X behind Y? One of the two hides a part of the other."""
    pairs = set(asker.pairs())
    chosen = asker.pick([("behind", i, j) for i, j in sorted(asker.scene.behind) if (i, j) in pairs])
    if chosen is None:
        return None
    _, back, front = chosen
    if asker.coin():
        return Question(wording.relation_question(asker.noun(back), "behind", asker.noun(front)), ("yes",))
    return Question(wording.relation_question(asker.noun(front), "behind", asker.noun(back)), ("no",))


def where(asker: Asker) -> Question | None:
    """Where is the X? The box of what is visible, as `Box.to_text` writes it."""
    chosen = asker.pick([("where", index) for index in asker.once if asker.chars[index] in asker.subjects])
    if chosen is None:
        return None
    _, index = chosen
    return Question(wording.where_question(asker.noun(index)), (asker.scene.objects[index].box.to_text(),))


def list_objects(asker: Asker) -> Question | None:
    """What objects are in this image? Each kind once, from left to right."""
    if asker.pick(["list"]) is None:
        return None
    return Question(wording.list_question(), (", ".join(asker.nouns[char].name for char in _from_left(asker)),))


def caption(asker: Asker) -> Question | None:
    """Describe this image: how many of everything, in three orders, once with how two of them lie."""
    if asker.pick(["caption"]) is None:
        return None
    kinds, numbers = _from_left(asker), Counter(asker.chars)
    shuffled = asker.rng.sample(kinds, len(kinds))
    orders = ([wording.counted(asker.nouns[char], numbers[char]) for char in order] for order in (kinds, shuffled))
    plain, other = (f"The image shows {wording.listing(order)}." for order in orders)
    chosen = _apart(asker, "caption")
    if chosen is None:
        return Question(wording.caption_request(), tuple(dict.fromkeys((plain, other))))
    i, j, axis, side = chosen
    stated = wording.statement(asker.noun(i), RELATIONS[axis][side], asker.noun(j))
    return Question(wording.caption_request(), tuple(dict.fromkeys((plain, other, f"{plain} {stated}"))))


def detect(asker: Asker) -> Question | None:
    """Find all objects: every one with its box, from left to right."""
    if asker.pick(["detect"]) is None:
        return None
    text = named_text((asker.nouns[thing.char].name, thing.box) for thing in _sorted(asker))
    return Question(wording.detect_request(), (text,))


def _sorted(asker: Asker) -> list[SceneObject]:
    return sorted(asker.scene.objects, key=lambda thing: thing.box.centre)


def _from_left(asker: Asker) -> list[str]:
    """The characters of the scene, by the centre of the first of each kind."""
    return list(dict.fromkeys(thing.char for thing in _sorted(asker)))


KINDS: dict[str, Callable[[Asker], Question | None]] = {
    "presence_random": presence_random,
    "presence_popular": presence_popular,
    "presence_adversarial": presence_adversarial,
    "count": count,
    "relation": relation,
    "side": which_side,
    "behind": behind,
    "where": where,
    "list": list_objects,
    "caption": caption,
    "detect": detect,
}
