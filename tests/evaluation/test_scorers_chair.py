from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.evaluation.scorers.chair import Vocabulary, score

NAMES = {
    "dog": ["puppy"],
    "hot dog": [],
    "person": ["man", "woman", "baby"],
    "elephant": ["baby elephant"],
    "glass": ["wine glass"],
    "glasses": ["spectacles"],
    "ear of corn": [],
    "t-shirt": [],
    "scissors": [],
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(NAMES, others=["dog days"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog and a Dog.", ["dog", "dog"]),
        ("Two puppies", ["dog"]),
        ("a hot dog, hot dogs", ["hot dog", "hot dog"]),
        ("a hot, dog-like thing", ["hot dog"]),  # marks are not looked at
        ("the dog days of summer", []),
        ("a dogma of hotdogs", []),
        ("men, women and people", ["person"] * 3),
        ("a baby beside a baby elephant", ["person", "elephant"]),
        ("a glass", ["glass"]),
        ("glasses", ["glasses"]),  # a plural that is itself a name is that
        ("wine glasses", ["glass"]),
        ("two ears of corn", ["ear of corn"]),
        ("a T-shirt and t shirts", ["t-shirt", "t-shirt"]),
        ("a pair of scissors", ["scissors"]),
        ("the dog's tail", ["dog"]),
        ("", []),
    ],
)
def test_mentions(vocabulary: Vocabulary, text: str, expected: list[str]) -> None:
    assert vocabulary.mentions(text) == expected


def test_by_hand(vocabulary: Vocabulary) -> None:
    captions = ["A dog, a dog and a man.", "Two elephants and a puppy.", "Nothing at all.", "A man with scissors."]
    truths = [["puppies"], ["elephant", "dog"], ["glass"], ["woman", "hot dog"]]
    scores = score(captions, truths, vocabulary)
    assert scores.num_mentions == 7
    assert scores.chair_i == pytest.approx(2 / 7)
    assert scores.chair_s == 0.5
    assert scores.coverage == pytest.approx(4 / 6)
    assert scores.hallucinated == (("person",), (), (), ("scissors",))
    assert scores.chair_i_samples == pytest.approx((1 / 3, 0.0, 0.0, 0.5))
    assert scores.chair_s_samples == (1.0, 0.0, 0.0, 1.0)


def test_saying_nothing_hallucinates_nothing_and_covers_nothing(vocabulary: Vocabulary) -> None:
    scores = score(["", ""], [["dog"], []], vocabulary)
    assert (scores.chair_i, scores.chair_s, scores.coverage, scores.num_mentions) == (0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary({"dog": ["pet"], "cat": ["pet"]}), "'pet' means both 'dog' and 'cat'"),
        (lambda: Vocabulary({"dog": []}, others=["Dog"]), "'Dog' means both 'dog' and None"),
        (lambda: Vocabulary({"!": []}), "'!' has no letter or digit"),
        (lambda: score(["a dog"], [["cat"]], Vocabulary({"dog": []})), "'cat' is the name of no object"),
        (lambda: score(["a dog"], [], Vocabulary({"dog": []})), "1 captions, 0 truths"),
    ],
)
def test_what_has_no_meaning_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plural_of_two_names_means_neither() -> None:
    vocabulary = Vocabulary({"buffalo": [], "buffaloe": []})
    assert vocabulary.mentions("buffaloes") == []
    assert vocabulary.mentions("a buffalo and a buffaloe") == ["buffalo", "buffaloe"]


ROWS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["a dog", "puppies", "a man", "hot dogs", "and", "scissors"]), max_size=6).map(
            ", ".join
        ),
        st.lists(st.sampled_from(["dog", "person", "hot dog", "scissors"]), max_size=4),
    ),
    min_size=1,
)


@settings(deadline=None)
@given(rows=ROWS, random=st.randoms())
def test_neither_order_nor_case_nor_copies_count(
    vocabulary: Vocabulary, rows: list[tuple[str, list[str]]], random: Random
) -> None:
    other = sorted(rows * 2, key=lambda _: random.random())
    before = score([text for text, _ in rows], [names for _, names in rows], vocabulary)
    after = score([text.upper() for text, _ in other], [names * 2 for _, names in other], vocabulary)
    for measure in ("chair_i", "chair_s", "coverage"):
        assert getattr(after, measure) == pytest.approx(getattr(before, measure))


@settings(deadline=None)
@given(rows=ROWS)
def test_what_is_there_is_never_hallucinated(vocabulary: Vocabulary, rows: list[tuple[str, list[str]]]) -> None:
    texts = [text for text, _ in rows]
    scores = score(texts, [vocabulary.mentions(text) for text in texts], vocabulary)
    assert scores.chair_i == scores.chair_s == 0.0
    assert scores.coverage == float(scores.num_mentions > 0)
