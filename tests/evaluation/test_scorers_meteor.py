from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.captions50 import FILE
from eyespot.evaluation.scorers import meteor
from eyespot.evaluation.scorers.captions import tokenize
from eyespot.evaluation.scorers.meteor import Counts, align, count, score

few = settings(max_examples=60, deadline=None)
STEMS = st.text("abcd", max_size=6).map(list)

# Of captions50.json, by meteor-1.5.jar of pycocoevalcap 1.2 with the first form's formula and weights:
# java -jar meteor-1.5.jar said given -l en -r 5 -m "exact stem" -p "0.9 3.0 0.5 0.5" -w "1.0 1.0"
JAR = """
0 .736111 .288671 0 .821158 .396825 .418944 .665732 .65333 .17094 .730028 .771194 0 .855159 .32053 0 .736111 .364435
.354635 .359677 .174419 .084746 .713244 .366667 0 .420635 .392593 0 .602703 .37234 .679487 .3125 .488889 .672597 .837171
.433145 0 .853495 .403333 .078125 1 .442387 .457317 .637143 .457428 .587963 .409903 .875743 0 .772341
"""
# The jar forgives the one chunk of a caption that equals a reference, and prefers fewer chunks to fewer crossings.
EQUAL, CROSSED = (40,), (41, 49)


@pytest.fixture(scope="module")
def fifty() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def scores(fifty: dict[str, Any]) -> meteor.MeteorScores:
    return score(*zip(*((item["prediction"], item["references"]) for item in fifty["captions"]), strict=True))


def test_scores_are_those_of_the_official_program_with_the_first_form_s_weights(scores: meteor.MeteorScores) -> None:
    for number, (ours, jar) in enumerate(zip(scores.samples, map(float, JAR.split()), strict=True)):
        if number in EQUAL:
            assert jar == 1 and ours == pytest.approx(1 - 0.5 / 12**3)
        elif number in CROSSED:
            assert ours < jar
        else:
            assert ours == pytest.approx(jar, abs=1e-6)


def test_captions_stand_in_nearly_the_order_of_meteor_1_5(fifty: dict[str, Any], scores: meteor.MeteorScores) -> None:
    ours, official = (np.argsort(np.argsort(v)) for v in (scores.samples, fifty["official"]["meteor_samples"]))
    assert np.corrcoef(ours, official)[0, 1] > 0.95


@pytest.mark.parametrize(
    ("said", "given_", "expected"),
    [
        ("the president spoke to the audience", "the president then spoke to the audience", Counts(6, 2, 6, 7)),
        ("a dog runs", "dogs running", Counts(2, 1, 3, 2)),
        ("A dog!", "a cat", Counts(1, 1, 2, 2)),
        ("one", "on", Counts(0, 0, 1, 1)),
        ("", "a dog", Counts(0, 0, 0, 2)),
        ("a dog", "", Counts(0, 0, 2, 0)),
    ],
)
def test_by_hand(said: str, given_: str, expected: Counts) -> None:
    stem = meteor._stemmer()
    assert count(*([stem(word) for word in tokenize(text)] for text in (said, given_))) == expected
    assert score([said], [[given_]]).samples == (expected.meteor,)


def test_the_formula_by_hand() -> None:
    """F-mean 10 x 1 x 6/7 over 6/7 + 9, less a half of (2/6)^3."""
    assert Counts(6, 2, 6, 7).meteor == pytest.approx(60 / 69 * (1 - 1 / 54))
    assert Counts(1, 1, 2, 1).meteor == pytest.approx(5 / 5.5 / 2)  # one word, one chunk: half of the mean
    assert Counts(0, 0, 2, 2).meteor == 0


@pytest.mark.parametrize(
    ("said", "given_", "links"),
    [
        ("a b c", "a b c", {0: 0, 1: 1, 2: 2}),
        ("a b", "b a", {0: 1, 1: 0}),
        ("a b", "a x a b", {0: 2, 1: 3}),  # no crossing either way, but one chunk
        ("b a c", "a b a c", {0: 1, 1: 2, 2: 3}),
        ("a x a b", "a b", {2: 0, 3: 1}),
        ("a b c a", "a c b", {0: 0, 1: 2, 2: 1}),  # one crossing, three chunks
    ],
)
def test_alignments_by_hand(said: str, given_: str, links: dict[int, int]) -> None:
    assert align(said.split(), given_.split()) == links


def cost(links: dict[int, int]) -> tuple[int, int, int]:
    """Matches (fewer are dearer), crossings and chunks, by their definitions."""
    pairs = sorted(links.items())
    crossings = sum(b > d for i, (_, b) in enumerate(pairs) for _, d in pairs[i + 1 :])
    chunks = len(pairs) - sum((place + 1, link + 1) in pairs for place, link in pairs)
    return -len(pairs), crossings, chunks


def every_alignment(said: list[str], given_: list[str]) -> Iterator[dict[int, int]]:
    """All ways to give each place another one of the reference, or none where the words differ."""
    for order in set(permutations([*range(len(given_)), *[-1] * len(said)], len(said))):
        yield {place: link for place, link in enumerate(order) if link >= 0 and said[place] == given_[link]}


@few
@given(st.text("abc", max_size=5).map(list), st.text("abc", max_size=5).map(list))
def test_no_alignment_is_better(said: list[str], given_: list[str]) -> None:
    best = min(map(cost, every_alignment(said, given_)))
    links = align(said, given_)
    assert all(said[place] == given_[link] for place, link in links.items())
    assert len(set(links.values())) == len(links)
    assert cost(links) == best
    assert count(said, given_) == Counts(-best[0], best[2], len(said), len(given_))


@few
@given(STEMS, STEMS)
def test_beside_each_other_either_way(first: list[str], second: list[str]) -> None:
    assert cost(align(first, second)) == cost(align(second, first))


def test_one_path_finds_all_matches_and_100_the_fewest_crossings(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    words = list("abcdefghij")
    texts = [(random.choice(words, 30).tolist(), random.choice(words, 30).tolist()) for _ in range(3)]
    found = {}
    for limit in (1, 100, 2000):
        monkeypatch.setattr(meteor, "MAX_PATHS", limit)
        found[limit] = [cost(align(*pair)) for pair in texts]
    assert found[100] == found[2000] < found[1]
    assert [matches for matches, _, _ in found[1]] == [matches for matches, _, _ in found[100]]


def test_the_best_reference_counts_and_the_set_sums_counts() -> None:
    said, given_ = ["a dog", "two cats on a mat"], [["a cat", "the dog runs", "a dog"], ["two cats"]]
    scores = score(said, given_)
    parts = Counts(2, 1, 2, 2), Counts(2, 1, 5, 2)
    assert scores.samples == tuple(part.meteor for part in parts)
    assert scores.mean == pytest.approx(sum(scores.samples) / 2)
    assert scores.meteor == Counts(4, 2, 7, 4).meteor
    assert score(said, [texts[::-1] for texts in given_]) == scores


@few
@given(st.lists(st.tuples(STEMS, st.lists(STEMS, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_limits(rows: list[tuple[list[str], list[list[str]]]]) -> None:
    scores = score([" ".join(words) for words, _ in rows], [[" ".join(text) for text in texts] for _, texts in rows])
    assert scores.num_captions == len(rows)
    assert all(0 <= value < 1 for value in (scores.meteor, scores.mean, *scores.samples))
    for (words, texts), value in zip(rows, scores.samples, strict=True):
        assert (value > 0) == any(set(words) & set(text) for text in texts)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "0 samples"),
        (["a"], [["a"], ["b"]], "1 predictions, 2 references"),
        (["a"], [[]], r"prediction 0 has the references \[\]"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(
    predictions: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "snowballstemmer", None)
    with pytest.raises(ImportError, match=r'pip install "eyespot\[captions\]"'):
        score(["a"], [["a"]])
