from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyespot.evaluation.controls import blind, image_key, majority, shuffled
from eyespot.evaluation.metrics import exact_match


def test_blind_removes_images_and_nothing_else(fakes: SimpleNamespace) -> None:
    sample = fakes.sample("1", ["a", "b"], "which is red?", "the first", "g")
    control = blind(sample)
    assert control.images == ()
    assert control.messages[0] == {"role": "user", "content": [{"type": "text", "text": "which is red?"}]}
    assert control.messages[1] == sample.messages[1]
    assert (control.id, control.answers, control.group) == (sample.id, sample.answers, sample.group)
    assert len(sample.images) == 2  # the original is untouched
    assert sample.messages[0]["content"][0] == {"type": "image"}


def test_blind_keeps_plain_text_and_an_emptied_turn(fakes: SimpleNamespace) -> None:
    sample = fakes.sample("1", ["a"], "", "a cat", "g")
    turns = ({"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a <image> cat"})
    control = blind(type(sample)("1", ("a",), turns, ("a cat",), "g"))
    assert control.messages == ({"role": "user", "content": [{"type": "text", "text": ""}]}, turns[1])


@given(sizes=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=2, max_size=8), seed=st.integers())
def test_shuffling_never_gives_a_group_its_own_picture(
    fakes: SimpleNamespace, sizes: list[list[int]], seed: int
) -> None:
    samples = [
        fakes.sample(f"{group}-{row}", [f"{group}/{number}" for number in range(count)], "q", "a", f"g{group}")
        for group, counts in enumerate(sizes)
        for row, count in enumerate(counts)
    ]
    if len({sample.group for sample in samples if sample.images}) == 1:
        with pytest.raises(ValueError, match="at least 2"):
            shuffled(samples, seed)
        return
    mixed = shuffled(samples, seed)
    assert mixed == shuffled(samples, seed)
    for before, after in zip(samples, mixed, strict=True):
        assert len(after.images) == len(before.images)
        assert all(f"g{image.split('/')[0]}" != before.group for image in after.images)
        assert (after.id, after.messages, after.answers) == (before.id, before.messages, before.answers)


def test_shuffling_is_a_permutation_of_pictures_and_depends_on_the_seed(fakes: SimpleNamespace) -> None:
    samples = fakes.samples(20)
    mixed = shuffled(samples, seed=0)
    assert sorted(sample.images[0] for sample in mixed) == sorted(sample.images[0] for sample in samples)
    assert mixed[0].images == mixed[1].images  # questions about one picture go on sharing one
    assert mixed != shuffled(samples, seed=1)


def test_a_picture_in_two_groups_is_not_given_back(fakes: SimpleNamespace) -> None:
    samples = [fakes.sample(str(row), [image], "q", "a", f"g{row}") for row, image in enumerate("aab")]
    assert [sample.images for sample in shuffled(samples, seed=0)] == [("b",), ("b",), ("a",)]
    with pytest.raises(ValueError, match="shares all its images"):
        shuffled(samples[:2], seed=0)


def test_shuffling_one_picture_is_refused_with_its_name(fakes: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"one group 'g'.*at least 2"):
        shuffled([fakes.sample(str(row), ["a"], "q", "a", "g") for row in range(3)], seed=0)


def test_majority_is_the_best_fixed_answer_for_each_text(fakes: SimpleNamespace) -> None:
    rows = [("colour?", "red", ()), ("colour?", "Grey", ("gray",)), ("colour?", "gray", ()), ("red?", "yes", ())]
    samples = [fakes.sample(str(n), [str(n)], q, a, str(n), more) for n, (q, a, more) in enumerate(rows)]
    assert majority(samples) == ["gray", "gray", "gray", "yes"]


@given(rows=st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abc")), min_size=1, max_size=12))
def test_no_function_of_the_words_beats_the_majority(fakes: SimpleNamespace, rows: list[tuple[str, str]]) -> None:
    samples = [fakes.sample(str(n), [str(n)], q, a, str(n)) for n, (q, a) in enumerate(rows)]

    def score(answers: Any) -> int:
        return sum(exact_match(answer, sample.answers) for answer, sample in zip(answers, samples, strict=True))

    best = score(majority(samples))
    for guess in ("aaa", "abc", "cab", "bbc"):
        table = dict(zip("xyz", guess, strict=True))
        assert score([table[question] for question, _ in rows]) <= best


def test_majority_of_a_reference_does_not_look_at_the_samples(fakes: SimpleNamespace) -> None:
    def asked(question: str, answer: str) -> Any:
        return fakes.sample(question + answer, ["p"], question, answer, "g")

    reference = [asked("known?", "no"), asked("other?", "blue"), asked("third?", "blue")]
    assert majority([asked("known?", "yes"), asked("new?", "red")], reference) == ["no", "blue"]
    with pytest.raises(ValueError, match="0 answers"):
        majority([asked("known?", "yes")], [])


def test_opened_pictures_are_told_apart_by_identity() -> None:
    one, two = [1], [1]
    assert image_key(one) == image_key(one)
    assert image_key(one) != image_key(two)
    assert image_key(b"x") == image_key(bytes(bytearray(b"x")))
