from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyespot.evaluation.scorers.pope import read_as_published, read_yes_no, score

# answer, what is read here, what the authors' script reads
READ = [
    ("Yes", True, True),
    ("no", False, False),
    ("NO", False, True),
    ("**No**", False, True),
    ("\nYes.\n", True, True),
    ("No, there is not.", False, False),
    ("Yes, though not a large one", True, False),
    ("There isn't any dog.", False, True),
    ("I don\u2019t see a dog.", False, True),
    ("I cannot see a dog.", False, True),
    ("There are no dogs.", False, False),
    ("There is none.", False, True),
    ("There is a dog.", True, True),
    ("There is no doubt.", True, False),
    ("Answer: no", False, False),
    ("The answer is yes.", True, True),
    ("Is there a dog? No.", False, False),
    ("Yes. It is not hidden.", True, True),
    ("I do not know.", None, False),
    ("I'm not really sure.", None, False),
    ("I cannot tell.", None, True),
    ("No idea.", None, False),
    ("yes or no", None, False),
    ("maybe", None, True),
    ("yesterday", None, True),
    ("I know noon", None, True),
    ("nothing", False, True),
    ("A cat on a mat", None, True),
    ("", None, True),
]


@pytest.mark.parametrize(("text", "expected", "published"), READ)
def test_reading(text: str, expected: bool | None, published: bool) -> None:
    assert read_yes_no(text) is expected
    assert read_as_published(text) is published


def test_measures_by_hand() -> None:
    said = ["yes"] * 4 + ["no"] * 3 + ["hm"] * 3
    there = [True, True, True, False, True, False, False, True, True, False]
    scores = score(said, there)
    assert (scores.num_questions, scores.unparsed) == (10, 3)
    assert scores.accuracy == 0.5  # 3 yes and 2 no
    assert scores.precision == 0.75
    assert scores.recall == 0.5  # of 6, one denied and two not answered
    assert scores.f1 == pytest.approx(0.6)
    assert scores.yes_rate == 0.4
    assert scores.samples == (1, 1, 1, 0, 0, 1, 1, 0, 0, 0)


def test_published_reading_gives_the_numbers_of_the_published_script() -> None:
    """TP, FP, TN and FN are 9, 9, 5 and 6 on the texts above.

    Source: https://github.com/haotian-liu/LLaVA, llava/eval/eval_pope.py, which has the authors' rule and measures.
    """
    texts = [text for text, _, _ in READ]
    truths = [number % 2 == 0 for number in range(len(texts))]
    scores = score(texts, truths, read=read_as_published)
    assert scores.unparsed == 0
    assert scores.precision == pytest.approx(9 / 18)
    assert scores.recall == pytest.approx(9 / 15)
    assert scores.yes_rate == pytest.approx(18 / 29)
    assert scores.accuracy == pytest.approx(14 / 29)


@pytest.mark.parametrize(("said", "precision", "recall", "yes_rate"), [("yes", 0.5, 1.0, 1.0), ("no", 0.0, 0.0, 0.0)])
def test_always_the_same_answer(said: str, precision: float, recall: float, yes_rate: float) -> None:
    scores = score([said] * 4, [True, False] * 2)
    assert (scores.precision, scores.recall, scores.yes_rate) == (precision, recall, yes_rate)
    assert scores.accuracy == 0.5


ANSWERS = st.sampled_from([text for text, _, _ in READ])


@settings(deadline=None)
@given(st.lists(st.tuples(ANSWERS, st.booleans()), min_size=1), st.randoms())
def test_order_and_copies_change_no_measure(rows: list[tuple[str, bool]], random: Random) -> None:
    mixed = sorted(rows * 3, key=lambda _: random.random())
    before, after = (score(*map(list, zip(*table, strict=True))) for table in (rows, mixed))
    for measure in ("accuracy", "precision", "recall", "f1", "yes_rate"):
        assert getattr(after, measure) == pytest.approx(getattr(before, measure))
    assert after.unparsed == 3 * before.unparsed


@settings(deadline=None)
@given(ANSWERS)
def test_case_changes_nothing(text: str) -> None:
    assert read_yes_no(text.upper()) is read_yes_no(text.lower()) is read_yes_no(text)


@settings(deadline=None)
@given(st.text(alphabet="yesno ", max_size=8))
def test_only_whole_words_are_read(text: str) -> None:
    meanings = {"yes": True, "no": False, "none": False}
    assert read_yes_no(text) is next((meanings[word] for word in text.split() if word in meanings), None)
