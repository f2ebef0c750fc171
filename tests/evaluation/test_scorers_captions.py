from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.captions50 import FILE, captions
from eyespot.evaluation.scorers.captions import bleu, cider_d, rouge_l, score, tokenize

# pycocoevalcap 1.2 with its Java tokenizer, over captions50.json: ``python tests/evaluation/captions50.py``
BLEU = (0.6392054261631411, 0.5145824661632828, 0.4309526216760294, 0.3633439431888716)
ROUGE_L = 0.4716205319726391
CIDER_D = 0.9649467860678588


@pytest.fixture(scope="module")
def fifty() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_the_fixture_is_what_its_program_writes(fifty: dict[str, Any]) -> None:
    assert fifty["captions"] == captions()
    assert len(fifty["captions"]) == 50
    assert {len(item["references"]) for item in fifty["captions"]} == {5}


def test_words_are_those_of_the_official_tokenizer(fifty: dict[str, Any]) -> None:
    for item, words in zip(fifty["captions"], fifty["official"]["words"], strict=True):
        assert " ".join(tokenize(item["prediction"])) == words["prediction"]
        assert [" ".join(tokenize(text)) for text in item["references"]] == words["references"]


def test_scores_are_those_of_the_official_code(fifty: dict[str, Any]) -> None:
    items, official = fifty["captions"], fifty["official"]
    scores = score([item["prediction"] for item in items], [item["references"] for item in items])
    assert scores.bleu == pytest.approx(BLEU, abs=1e-9)
    assert scores.rouge_l == pytest.approx(ROUGE_L, abs=1e-9)
    assert scores.cider_d == pytest.approx(CIDER_D, abs=1e-9)
    assert scores.bleu_4_samples == pytest.approx(official["bleu_4_samples"], abs=1e-9)
    assert scores.rouge_l_samples == pytest.approx(official["rouge_l_samples"], abs=1e-9)
    assert scores.cider_d_samples == pytest.approx(official["cider_d_samples"], abs=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog isn't here; it's (maybe) there...", "a man 's dog is n't here it 's -lrb- maybe -rrb- there"),
        ("They wouldn't've, I cannot!", "they would n't 've i can not"),
        ("the kids\u2019 \u201cnew\u201d toys \u2014 don\u2019t", "the kids new toys do n't"),
        ("A U.S. flag at 10:30 a.m. on St. Mary's street.", "a u.s. flag at 10:30 a.m. on st. mary 's street"),
        ("1,000 people, 3.5% & $3.50 #1 1/2", "1,000 people 3.5 % & $ 3.50 # 1 1/2"),
        ("a well-lit black/white t-shirt - 5-year-old", "a well-lit black/white t-shirt 5-year-old"),
        ("a '57 Chevy at 5 o'clock, gonna 'twas", "a '57 chevy at 5 o'clock gon na 't was"),
        ("3ft. x 4ft [sic]", "3ft x 4ft -lsb- sic -rsb-"),
        ("caf\u00e9 ?!", "caf\u00e9"),
        (" \n", ""),
    ],
)
def test_words_by_the_output_of_stanfords_tokenizer(text: str, words: str) -> None:
    """Source: PTBTokenizer of stanford-corenlp-3.4.1.jar, ``-preserveLines -lowerCase``, without punctuation."""
    assert tokenize(text) == words.split()


def test_bleu_by_hand() -> None:
    """Clipped counts: Papineni et al. 2002, https://aclanthology.org/P02-1040, example 2."""
    said, given = (
        [["the"] * 7],
        [[["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]],
    )
    assert bleu(said, given)[0][0] == pytest.approx(2 / 7)
    total, samples = bleu([["a"], ["a", "b"]], [[["a"]], [["a", "c", "d"]]])
    brevity = math.exp(1 - 4 / 3)
    assert total[:2] == pytest.approx([brevity * 2 / 3, 0.0], abs=1e-4)
    assert samples[:, 0] == pytest.approx([1.0, 0.5 * math.exp(1 - 3 / 2)])


def test_rouge_by_hand() -> None:
    """Lin 2004, https://aclanthology.org/W04-1013, section 3.1: a subsequence of three words of four."""
    given = [["police", "killed", "the", "gunman"]]
    assert rouge_l([["police", "kill", "the", "gunman"]], [given]) == pytest.approx([0.75])
    assert rouge_l([["the", "gunman", "kill", "police"]], [given]) == pytest.approx([0.5])
    precision, recall = 1.0, 0.5  # the best of two references, and not of the same one
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l([["a"]], [[["a", "b"], ["c", "a", "d"]]]) == pytest.approx([expected])


def test_cider_by_hand() -> None:
    given = [[["dog"]], [["cat"]]]
    assert cider_d([["dog"], ["cat"]], given) == pytest.approx([2.5, 2.5])  # one of the four lengths of n-gram
    assert cider_d([["cat"], []], given) == [0.0, 0.0]
    repeated = 10 / 4 * 0.5 * math.exp(-1 / 72)  # clipped; one 2-gram too many; both words weigh the same
    assert cider_d([["dog", "dog"], ["cat"]], given)[0] == pytest.approx(repeated)
    caption = ["a", "dog", "in", "the", "sun"]
    assert cider_d([caption, ["cat"]], [[caption], [["cat"]]])[0] == pytest.approx(10.0)
    assert cider_d([caption], [[caption]]) == [0.0]  # one picture: no n-gram is rarer than another


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "0 samples"),
        (["a"], [["a"], ["b"]], "1 predictions, 2 references"),
        (["a"], [[]], r"prediction 0 has the references \[\]"),
        (["a"], ["a"], "prediction 0 has the references 'a'"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(
    predictions: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


CAPTION = st.lists(st.sampled_from(["a", "dog", "cat", "isn't", "on", "the", "mat", "T-shirt", "."]), max_size=9)
TEXT = CAPTION.map(" ".join)
ROWS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=5)
few = settings(max_examples=40, deadline=None)


@few
@given(ROWS, st.randoms())
def test_order_only_orders(rows: list[tuple[str, list[str]]], random: Random) -> None:
    order = sorted(range(len(rows)), key=lambda _: random.random())
    before = score([text for text, _ in rows], [texts for _, texts in rows])
    after = score([rows[i][0] for i in order], [rows[i][1][::-1] for i in order])
    assert after.bleu == pytest.approx(before.bleu)
    assert after.cider_d == pytest.approx(before.cider_d)
    for name in ("bleu_4_samples", "rouge_l_samples", "cider_d_samples"):
        assert getattr(after, name) == pytest.approx([getattr(before, name)[i] for i in order])


@few
@given(ROWS)
def test_neither_case_nor_final_punctuation_nor_copies_of_references_count(rows: list[tuple[str, list[str]]]) -> None:
    plain = score([text for text, _ in rows], [texts for _, texts in rows])
    other = score([f" {text.upper()} !" for text, _ in rows], [texts * 2 for _, texts in rows])
    assert other.bleu == pytest.approx(plain.bleu)
    assert other.rouge_l_samples == pytest.approx(plain.rouge_l_samples)
    assert other.cider_d_samples == pytest.approx(plain.cider_d_samples)


@few
@given(ROWS)
def test_limits(rows: list[tuple[str, list[str]]]) -> None:
    scores = score([text for text, _ in rows], [texts for _, texts in rows])
    assert all(0 <= value <= 1 + 1e-9 for value in (*scores.bleu, *scores.bleu_4_samples, *scores.rouge_l_samples))
    assert all(0 <= value <= 10 + 1e-9 for value in scores.cider_d_samples)
    same = score([texts[0] for _, texts in rows], [[texts[0]] for _, texts in rows])
    for (_, texts), rouge in zip(rows, same.rouge_l_samples, strict=True):
        assert rouge == pytest.approx(float(bool(tokenize(texts[0]))))


def longest_common(first: list[str], second: list[str]) -> int:
    """By the definition."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + longest_common(first[:-1], second[:-1])
    return max(longest_common(first[:-1], second), longest_common(first, second[:-1]))


@few
@given(st.text("abc", max_size=7).map(list), st.text("abc", min_size=1, max_size=7).map(list))
def test_common_subsequence_is_the_longest(first: list[str], second: list[str]) -> None:
    common = longest_common(first, second)
    precision, recall = common / max(len(first), 1), common / len(second)
    expected = 2.44 * precision * recall / (recall + 1.44 * precision) if common else 0.0
    assert rouge_l([first], [[second]]) == pytest.approx([expected])


@few
@given(st.text(max_size=30))
def test_words_have_no_space_and_are_stable(text: str) -> None:
    words = tokenize(text)
    assert all(word and word == word.strip() and " " not in word for word in words)
    assert tokenize(f"  {text}\n") == words
