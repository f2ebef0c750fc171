"""Captions beside reference captions: BLEU, ROUGE-L and CIDEr-D, with the numbers of the COCO caption evaluation.

METEOR, which needs a stemmer, stands in ``meteor.py``.
Source: arXiv 1504.00325, https://github.com/salaniz/pycocoevalcap (the official code, packaged).

Shape letter: S captions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from eyespot.evaluation.scorers.columns import check_columns

MAX_NGRAM = 4
# The official code adds these so that nothing is divided by zero; without a common 4-gram they alone make BLEU-4.
_TINY, _SMALL = 1e-15, 1e-9
_BETA = 1.2
_SIGMA = 6.0
_SCALE = 10.0

Ngram = tuple[str, ...]

_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": " - ", "\u2014": " - "})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?![^\W_])")
_JOINED = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me))\b|(?<!\w)('t)(is|was)\b")
_TOKEN = re.compile(
    r"(?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.|(?:[^\W\d_]\.){2,}"  # abbreviations keep their period
    r"|[+-]?\d+(?:[.,:/]\d+)*(?:-[^\W_]+)*(?![^\W_])"  # 1,000, 10:30, 1/2, 3.5-foot
    r"|n't|'(?:s|m|d|re|ve|ll|t)\b|'\d\ds?\b"
    r"|[^\W_]+(?:[-'/&@.][^\W_]+)*"  # well-lit, o'clock, black/white
    r"|\S"
)
_DROPPED = frozenset(".?!,:;'\"`-\u2026")


@dataclass(frozen=True)
class CaptionScores:
    """Scores of the set, and of each caption in ``*_samples``, in their order.

    bleu is BLEU-1 to BLEU-4 of the set, which is not the mean of the captions'. All are in [0, 1] but CIDEr-D, which is
    in [0, 10] as the official code prints it; papers often show it times 100.
    """

    num_captions: int
    bleu: tuple[float, float, float, float]
    rouge_l: float
    cider_d: float
    bleu_4_samples: tuple[float, ...]
    rouge_l_samples: tuple[float, ...]
    cider_d_samples: tuple[float, ...]


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """All measures of this file, of captions as they were written.

    Args:
        predictions: one caption for each picture; an empty one scores 0.
        references: of each picture one caption or more.

    Raises:
        ValueError: no caption, numbers that differ, or a picture without references.
    """
    said, given = tokenized(predictions, references)
    (one, two, three, four), precisions = bleu(said, given)
    rouge, cider = rouge_l(said, given), cider_d(said, given)
    return CaptionScores(
        num_captions=len(said),
        bleu=(float(one), float(two), float(three), float(four)),
        rouge_l=sum(rouge) / len(rouge),
        cider_d=sum(cider) / len(cider),
        bleu_4_samples=tuple(precisions[:, -1].tolist()),
        rouge_l_samples=tuple(rouge),
        cider_d_samples=tuple(cider),
    )


def tokenized(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """``tokenize`` over everything.

    Raises:
        ValueError: as ``score``.
    """
    check_columns(predictions=predictions, references=references)
    for number, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"prediction {number} has the references {texts!r}; give a list with one text or more")
    return [tokenize(text) for text in predictions], [[tokenize(text) for text in texts] for texts in references]


def tokenize(text: str) -> list[str]:
    """Lower-case words in the manner of the Penn Treebank, without punctuation.

    As Stanford's PTBTokenizer 3.4.1 with ``-lowerCase`` and the official list of punctuation do it: clitics are words,
    hyphens hold words together, brackets stay, as "-lrb-" and so on (the list has them in upper case, the tokenizer
    writes them in lower case). Other than there, an abbreviation keeps its period only if it is one of a few or has a
    period after every letter, and addresses, smileys and words joined by several apostrophes (rock'n'roll) are unknown.
    Source: https://nlp.stanford.edu/software/tokenizer.html, https://github.com/salaniz/pycocoevalcap (tokenizer).

    >>> tokenize("A man's dog isn't here -- it's on a well-lit bench.")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'here', 'it', "'s", 'on', 'a', 'well-lit', 'bench']
    """
    plain = text.lower().translate(_PLAIN)
    apart = _CLITIC.sub(r" \1", _CLITIC.sub(r" \1", plain))  # twice for would n't 've
    apart = _JOINED.sub(lambda match: " ".join(filter(None, match.groups())), apart)
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(apart) if token not in _DROPPED]


def bleu(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """BLEU-1 to BLEU-4 of the set, float64 [4], and of every caption, [S, 4], of words from ``tokenize``.

    The set's counts are summed before anything is divided; the brevity penalty takes the reference of the nearest
    length, the shorter one of two.
    Source: Papineni et al. 2002, https://aclanthology.org/P02-1040, with the constants of the official code.
    """
    rows = np.array([_bleu_row(words, texts) for words, texts in zip(predictions, references, strict=True)])
    return _bleu(rows.sum(axis=0, keepdims=True))[0], _bleu(rows)


def rouge_l(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """F-measure of the longest common subsequence of each caption, with beta 1.2, in [0, 1].

    Precision and recall are each the best over the references, which need not be of the same one.
    Source: Lin 2004, https://aclanthology.org/W04-1013; beta and the maxima from the official code.
    """
    return [_rouge_l(words, texts) for words, texts in zip(predictions, references, strict=True)]


def cider_d(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each caption, in [0, 10]: 10 times the mean over n = 1..4 and the references of a clipped cosine.

    n-grams weigh by how few pictures have them in any reference, so the score depends on the whole set, and with one
    picture all weights and scores are 0. The penalty on unequal lengths counts 2-grams, as the official code does.
    Source: arXiv 1411.5726, section 5 and 9 (CIDEr-D; sigma 6).
    """
    counts = [[Counter(_ngrams(words)) for words in texts] for texts in references]
    pictures = Counter(ngram for texts in counts for ngram in set().union(*texts))
    rarest = math.log(len(counts))
    weights = {ngram: rarest - math.log(number) for ngram, number in pictures.items()}
    scores = []
    for words, texts in zip(predictions, counts, strict=True):
        vector = _Vector.of(Counter(_ngrams(words)), weights, rarest)
        total = sum(vector.similarity(_Vector.of(text, weights, rarest)) for text in texts)
        scores.append(_SCALE * total / len(texts))
    return scores


@dataclass(frozen=True)
class _Vector:
    """tf-idf of all n-grams together, the norm for every n, and the number of 2-grams."""

    values: dict[Ngram, float]
    norms: list[float]
    num_pairs: int

    @classmethod
    def of(cls, counts: Counter[Ngram], weights: dict[Ngram, float], unknown: float) -> _Vector:
        values = {ngram: count * weights.get(ngram, unknown) for ngram, count in counts.items()}
        squares = [0.0] * MAX_NGRAM
        for ngram, value in values.items():
            squares[len(ngram) - 1] += value * value
        num_pairs = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return cls(values, [math.sqrt(square) for square in squares], num_pairs)

    def similarity(self, other: _Vector) -> float:
        """Of a prediction, this, to a reference: in [0, 1]."""
        products = [0.0] * MAX_NGRAM
        for ngram, value in self.values.items():
            if truth := other.values.get(ngram):
                products[len(ngram) - 1] += min(value, truth) * truth
        cosines = sum(
            product / (mine * theirs)
            for product, mine, theirs in zip(products, self.norms, other.norms, strict=True)
            if product
        )
        return cosines / MAX_NGRAM * math.exp(-((self.num_pairs - other.num_pairs) ** 2) / (2 * _SIGMA**2))


def _ngrams(words: Sequence[str]) -> Iterator[Ngram]:
    """All of 1 to 4 words."""
    sizes = range(1, MAX_NGRAM + 1)
    return chain.from_iterable(zip(*(words[start:] for start in range(size)), strict=False) for size in sizes)


def _bleu_row(words: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """10 counts: length, nearest reference length, n-grams that match and n-grams that there are, for n = 1..4."""
    allowed: Counter[Ngram] = Counter()
    for text in references:
        allowed |= Counter(_ngrams(text))
    matched = [0] * MAX_NGRAM
    for ngram, count in (Counter(_ngrams(words)) & allowed).items():
        matched[len(ngram) - 1] += count
    possible = [max(len(words) - n, 0) for n in range(MAX_NGRAM)]
    nearest = min((abs(len(text) - len(words)), len(text)) for text in references)[1]
    return [len(words), nearest, *matched, *possible]


def _bleu(rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [S, 4] of counts [S, 10]."""
    length, nearest = rows[:, 0], rows[:, 1]
    matched, possible = rows[:, 2 : 2 + MAX_NGRAM], rows[:, 2 + MAX_NGRAM :]
    means = np.cumprod((matched + _TINY) / (possible + _SMALL), axis=1) ** (1 / np.arange(1, MAX_NGRAM + 1))
    ratio = (length + _TINY) / (nearest + _SMALL)
    brevity = np.exp(np.minimum(1 - 1 / ratio, 0))
    return np.asarray(means * brevity[:, None])


def _rouge_l(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    common = [_common_length(words, text) for text in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(length / len(text) for length, text in zip(common, references, strict=True) if text)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the usual table in the bits of one number.

    Source: Hyyrö 2004, Bit-parallel LCS-length computation revisited (AWOCA).
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = row = (1 << len(first)) - 1
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & every
    return len(first) - row.bit_count()
