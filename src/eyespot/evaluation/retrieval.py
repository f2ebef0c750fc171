"""Retrieval: which text belongs to a picture and which picture to a text, among all that are there.

The gallery holds every picture once and every text once: what stands under two pictures is one text, right for both.
A result is worth as much as its gallery is large, so chance stands beside it.

Shape letters: I pictures, T texts, K vectors for each picture, d their width, k candidates.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eyespot.data.features import picture_digest
from eyespot.data.pairs import pair_of, text_number
from eyespot.data.sample import ImageSource, Sample, text_part
from eyespot.evaluation.metrics import cluster_bootstrap
from eyespot.inference import Assistant, load
from eyespot.models.alignment import similarity
from eyespot.models.text_sides import text_side

AT = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """Share of the queries with a right answer among the first so many, its interval over pictures, and chance."""

    recall: float
    interval: tuple[float, float]
    chance: float


@dataclass(frozen=True)
class Retrieval:
    """Recall by the number of answers that are looked at, in both directions.

    reranked: so many candidates of each query were put in order by the matching head; 0: similarity alone.
    """

    num_images: int
    num_texts: int
    reranked: int
    image_to_text: dict[int, Recall]
    text_to_image: dict[int, Recall]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; recalls are named "recall@1"."""
        values = asdict(self)
        for direction in ("image_to_text", "text_to_image"):
            values[direction] = {f"recall@{k}": values[direction][k] for k in values[direction]}
        return values


@dataclass(frozen=True)
class Gallery:
    """Distinct pictures and texts, the conversation that says each text, and what belongs together, bool [I, T]."""

    images: list[ImageSource]
    texts: list[str]
    conversations: list[list[Any]]
    right: NDArray[np.bool_]


def evaluate_retrieval(
    model: str | Path | Assistant,
    samples: Sequence[Sample],
    *,
    rerank: int = 0,
    batch_size: int = 32,
    device: str = "auto",
) -> Retrieval:
    """How well a model with an alignment head finds texts for pictures and pictures for texts.

    Args:
        model: its folder, or the model ready to be asked.
        samples: pictures with one or more captions, or with one answer.
        rerank: so many candidates of each query are put in order by the matching head (arXiv 2301.12597, section 4.4).
        batch_size: pictures, texts or pairs that are read at once.
        device: of a model that is loaded.

    Raises:
        ValueError: the model has no alignment head, or a sample is no picture with texts.
    """
    assistant = model if isinstance(model, Assistant) else load(model, device)
    if assistant.model.alignment is None:
        raise ValueError("the model has no alignment head; train one with model.alignment and a stage of pairs")
    if rerank < 0:
        raise ValueError(f"rerank is {rerank}; give 0 or more candidates")
    gallery = gallery_of(samples)
    to_texts = similarities(assistant, gallery, batch_size)
    to_images = to_texts.T
    if rerank:
        chosen_texts, chosen_images = candidates(to_texts, rerank), candidates(to_images, rerank)
        odds = match_odds(assistant, gallery, chosen_texts | chosen_images.T, batch_size)
        to_texts, to_images = preferred(to_texts, odds, chosen_texts), preferred(to_images, odds.T, chosen_images)
    right = gallery.right
    return Retrieval(
        len(gallery.images),
        len(gallery.texts),
        rerank,
        recalls(to_texts, right, range(len(gallery.images))),
        recalls(to_images, right.T, right.argmax(axis=0).tolist()),
    )


def measure_retrieval(assistant: Assistant, samples: Sequence[Sample]) -> dict[str, Any]:
    """``evaluate_retrieval`` at the end of a training stage, as plain values."""
    return evaluate_retrieval(assistant, samples).to_dict()


def gallery_of(samples: Sequence[Sample]) -> Gallery:
    """Distinct pictures and texts of the samples, in the order in which they come."""
    images: dict[bytes, ImageSource] = {}
    texts: dict[int, tuple[str, list[Any]]] = {}
    pairs = set()
    for sample in samples:
        image, shown = pair_of(sample)
        digest = picture_digest(image)
        images.setdefault(digest, image)
        for text in sample.captions or (shown,):
            answer = {"role": "assistant", "content": [text_part(text)]}
            said = [answer if message["role"] == "assistant" else message for message in sample.messages]
            texts.setdefault(text_number(text), (text, said))
            pairs.add((digest, text_number(text)))
    rows = {digest: i for i, digest in enumerate(images)}
    columns = {number: i for i, number in enumerate(texts)}
    right = np.zeros((len(images), len(texts)), dtype=np.bool_)
    for digest, number in pairs:
        right[rows[digest], columns[number]] = True
    return Gallery(
        list(images.values()), [text for text, _ in texts.values()], [said for _, said in texts.values()], right
    )


@torch.inference_mode()
def similarities(assistant: Assistant, gallery: Gallery, batch_size: int) -> NDArray[np.float64]:
    """Cosines of all pictures with all texts, float64 [I, T]."""
    model, side = assistant.model, text_side(assistant.model)
    assert model.alignment is not None
    with assistant.autocast():
        text_vectors = [
            model.alignment.text_vectors(side.text_states(_on(assistant, assistant.processor.encode_texts(texts))))
            for texts in _pieces(gallery.texts, batch_size)
        ]
        rows = []
        for pictures in _pieces(gallery.images, batch_size):
            states = side.image_states(side.images(assistant.features(pictures)))
            vectors = model.alignment.image_vectors(states)  # [N, K, d]
            rows.append(torch.cat([similarity(vectors, texts) for texts in text_vectors], dim=1).cpu())
    return torch.cat(rows).double().numpy()


@torch.inference_mode()
def match_odds(
    assistant: Assistant, gallery: Gallery, wanted: NDArray[np.bool_], batch_size: int
) -> NDArray[np.float64]:
    """Log odds of "match" by the matching head, float64 [I, T]; 0 where ``wanted`` bool [I, T] is not set."""
    model, side = assistant.model, text_side(assistant.model)
    assert model.alignment is not None
    odds = np.zeros(wanted.shape)
    for row, picture in enumerate(gallery.images):
        features = assistant.features([picture])
        for columns in _pieces(wanted[row].nonzero()[0].tolist(), batch_size):
            batch = _on(assistant, _words(assistant, gallery, columns))
            with assistant.autocast():
                images = side.images(features)
                shown = images.expand(len(columns), *images.shape[1:])
                states = side.match_states(shown, *(batch[name] for name in side.columns))
                logits = model.alignment.match_logits(states)
            odds[row, columns] = (logits[:, 1] - logits[:, 0]).double().cpu().numpy()
    return odds


def _words(assistant: Assistant, gallery: Gallery, columns: Sequence[int]) -> dict[str, Tensor]:
    """Texts as they stand beside a picture: alone for a text side, in their conversations for a language model."""
    processor = assistant.processor
    if processor.text_tokenizer is not None:
        return processor.encode_texts([gallery.texts[i] for i in columns])
    return processor.pad([processor.encode_conversation(gallery.conversations[i]) for i in columns], "right")


def _on(assistant: Assistant, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(assistant.device) for name, tensor in batch.items()}


def _pieces(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def candidates(scores: NDArray[np.float64], number: int) -> NDArray[np.bool_]:
    """The best so many of each row, bool of the shape of ``scores``."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :number]
    chosen = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


def preferred(scores: NDArray[np.float64], odds: NDArray[np.float64], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scores in which the chosen stand before all others, in the order of their odds."""
    above = scores.max() - odds.min() + 1
    return np.where(chosen, odds + above, scores)


def ranks(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many wrong answers stand before the best right one, int64 [Q]; an equal score counts as before, so that a
    model which cannot tell them apart gains nothing.

    Args:
        scores: [Q, G]. right: bool [Q, G], at least one in each row.
    """
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    counts: NDArray[np.int64] = ((scores >= best) & ~right).sum(axis=1)
    return counts


def recalls(scores: NDArray[np.float64], right: NDArray[np.bool_], pictures: Sequence[Hashable]) -> dict[int, Recall]:
    """Recall among the first 1, 5 and 10, for queries [Q] over a gallery [G].

    Args:
        scores, right: [Q, G]. pictures: of each query, for the interval (see ``cluster_bootstrap``).
    """
    found = ranks(scores, right)
    num_right, size = right.sum(axis=1), right.shape[1]
    hits = {at: (found < at).astype(np.float64) for at in AT}
    return {
        at: Recall(float(hit.mean()), cluster_bootstrap(hit, pictures), chance_of(num_right, size, at))
        for at, hit in hits.items()
    }


def chance_of(num_right: NDArray[np.int64], size: int, at: int) -> float:
    """Mean over queries of the chance that a random order has a right answer among the first so many.

    Of ``size`` answers r are right: 1 - C(size - r, at) / C(size, at), the hypergeometric chance of at least one.
    """
    at = min(at, size)
    ways = math.comb(size, at)
    values, counts = np.unique(num_right, return_counts=True)
    hits = [1 - math.comb(size - int(r), at) / ways for r in values]
    return float(np.average(hits, weights=counts))
