"""Recall in both directions against a loop, chance against counting, and a model whose answers are known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eyespot
from drawn import draw_captions
from eyespot.data import sources
from eyespot.data.sample import Sample
from eyespot.evaluation.retrieval import (
    Retrieval,
    candidates,
    chance_of,
    evaluate_retrieval,
    gallery_of,
    match_odds,
    measure_retrieval,
    preferred,
    ranks,
    recalls,
    similarities,
)
from eyespot.inference import Assistant
from eyespot.models.text_sides import text_side
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Processor
from tiny import randomise

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **SIZES}}
GPT = {"name": "gpt", "args": {"max_position_embeddings": 64, **SIZES}}
SIDES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qformer": (
        {"name": "qformer", "args": {"num_queries": 3, "hidden_dim": 16, "depth": 2, "heads": 2, "dropout": 0.0}},
        {"dim": 8, "max_text": 24, "tokenizer": "byte"},
    ),
    "language": ({"name": "mlp"}, {"dim": 8, "max_text": 24}),
}


@pytest.fixture(scope="module", params=list(SIDES))
def made(request: pytest.FixtureRequest) -> tuple[VLM, Processor]:
    torch.manual_seed(0)
    connector, alignment = SIDES[request.param]
    model, processor = eyespot.build(VISION, connector, GPT, alignment=alignment)
    randomise(model)
    return model, processor


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return sources.load("captions", path=str(draw_captions(tmp_path_factory.mktemp("drawn"), 14)))[0]


def test_ranks_count_what_stands_before_the_best_right_answer() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (40, 7)).astype(np.float64)  # with ties
    right = rng.random((40, 7)) < 0.3
    right[range(40), rng.integers(0, 7, 40)] = True
    expected = []
    for row, own in zip(scores, right, strict=True):
        best = max(score for score, belongs in zip(row, own, strict=True) if belongs)
        expected.append(sum(score >= best for score, belongs in zip(row, own, strict=True) if not belongs))
    assert ranks(scores, right).tolist() == expected


def test_a_model_that_sees_no_difference_finds_nothing() -> None:
    found = recalls(np.zeros((20, 20)), np.eye(20, dtype=np.bool_), range(20))
    assert [found[at].recall for at in (1, 5, 10)] == [0, 0, 0]


def test_recall_of_a_known_order() -> None:
    scores = -np.abs(np.arange(12)[:, None] - np.arange(12)[None]).astype(np.float64)
    right = np.roll(np.eye(12, dtype=np.bool_), 1, axis=1)  # beside the best one, but for the last row
    found = recalls(scores, right, range(12))
    assert found[1].recall == 0 and found[5].recall == found[10].recall == pytest.approx(11 / 12)
    low, high = found[5].interval
    assert low <= 11 / 12 <= high and 0.6 < low < high <= 1
    assert found[5].chance == pytest.approx(5 / 12)


def test_chance_is_what_counting_all_orders_gives() -> None:
    for size, right, at in [(6, 1, 1), (6, 2, 3), (5, 3, 2), (4, 1, 10)]:
        looks = list(itertools.combinations(range(size), min(at, size)))
        hits = sum(any(place < right for place in look) for look in looks)
        assert chance_of(np.array([right]), size, at) == pytest.approx(hits / len(looks))
    assert chance_of(np.array([1, 1, 2]), 10, 1) == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert chance_of(np.array([1]), 25_000, 10) == pytest.approx(10 / 25_000)


def test_candidates_are_reordered_before_all_others() -> None:
    scores = np.array([[0.9, 0.8, 0.1, 0.7], [0.1, 0.2, 0.3, 0.4]])
    chosen = candidates(scores, 2)
    assert chosen.tolist() == [[True, True, False, False], [False, False, True, True]]
    odds = np.where(chosen, [[-5.0, -1.0, 0, 0], [0, 0, 2.0, -9.0]], 0)
    assert np.argsort(-preferred(scores, odds, chosen), axis=1).tolist() == [[1, 0, 3, 2], [2, 3, 1, 0]]


def test_the_gallery_holds_everything_once(samples: list[Sample]) -> None:
    gallery = gallery_of([*samples, samples[0]])
    assert len(gallery.images) == 14 and len(gallery.texts) == 24  # two pictures repeat what others are called
    assert gallery.right.sum(axis=1).tolist() == [2] * 14
    assert sorted(gallery.right.sum(axis=0).tolist()) == [1] * 20 + [2] * 4
    assert gallery.right[12, gallery.texts.index("a red circle")] and gallery.right[0, 0]
    said = gallery.conversations[gallery.texts.index("one circle, red")]
    assert said[-1]["content"] == [{"type": "text", "text": "one circle, red"}] and said[0] == samples[0].messages[0]


@torch.no_grad()
def test_scores_are_those_of_one_pair_at_a_time(made: tuple[VLM, Processor], samples: list[Sample]) -> None:
    assistant = Assistant(*made, "cpu")
    model, side = assistant.model, text_side(assistant.model)
    assert model.alignment is not None
    gallery = gallery_of(samples[:3])
    wanted = np.ones((3, 6), dtype=np.bool_)
    wanted[0, 1] = False
    found, odds = similarities(assistant, gallery, 2), match_odds(assistant, gallery, wanted, 4)
    assert odds[0, 1] == 0
    for i, t in itertools.product(range(3), range(6)):
        images = side.images(assistant.features([gallery.images[i]]))
        batch = assistant.processor.encode_texts([gallery.texts[t]])
        row = assistant.processor.encode_conversation(gallery.conversations[t])
        batch |= assistant.processor.pad([row], "right")
        text = model.alignment.text_vectors(side.text_states(batch))[0]
        vectors = model.alignment.image_vectors(side.image_states(images))[0]
        assert found[i, t] == pytest.approx(float((vectors @ text).max()), abs=1e-5)
        logits = model.alignment.match_logits(side.match_states(images, *(batch[name] for name in side.columns)))[0]
        if wanted[i, t]:
            assert odds[i, t] == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)


def test_a_saved_model_gives_the_same_numbers(
    made: tuple[VLM, Processor], samples: list[Sample], tmp_path: Path
) -> None:
    eyespot.save(*made, tmp_path / "model")
    one = evaluate_retrieval(Assistant(*made, "cpu"), samples, rerank=3)
    other = evaluate_retrieval(tmp_path / "model", samples, rerank=3, batch_size=5, device="cpu")
    assert isinstance(one, Retrieval) and one == other
    assert (one.num_images, one.num_texts, one.reranked) == (14, 24, 3)
    plain = measure_retrieval(Assistant(*made, "cpu"), samples)
    assert set(json.loads(json.dumps(plain))["image_to_text"]) == {"recall@1", "recall@5", "recall@10"}
    assert plain["reranked"] == 0
    assert plain["image_to_text"]["recall@10"]["recall"] == one.image_to_text[10].recall
    assert plain["text_to_image"]["recall@1"]["chance"] == pytest.approx((20 * 1 + 4 * 2) / 24 / 14)


def test_bfloat16_blurs_but_does_not_break(made: tuple[VLM, Processor], samples: list[Sample], tmp_path: Path) -> None:
    eyespot.save(*made, tmp_path)
    gallery = gallery_of(samples)
    exact, blurred = (eyespot.load(tmp_path, "cpu", dtype) for dtype in ("float32", "bfloat16"))
    assert blurred.model.compute_dtype == torch.bfloat16 and blurred.model.alignment is not None
    assert blurred.model.alignment.match.weight.dtype == torch.float32
    difference = np.abs(similarities(exact, gallery, 32) - similarities(blurred, gallery, 32)).max()
    assert 0 < difference < 0.1
    assert evaluate_retrieval(blurred, samples, rerank=2).num_texts == 24


def test_reranking_by_a_head_that_knows_finds_what_is_among_the_candidates(
    made: tuple[VLM, Processor], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = gallery_of(samples)
    monkeypatch.setattr(
        "eyespot.evaluation.retrieval.match_odds",
        lambda assistant, gallery, wanted, size: np.where(wanted, np.where(gallery.right, 4.0, -4.0), 0.0),
    )
    assistant = Assistant(*made, "cpu")
    scores = similarities(assistant, gallery, 32)
    found = evaluate_retrieval(assistant, samples, rerank=5)
    among = (candidates(scores, 5) & gallery.right).any(axis=1).mean()
    assert found.image_to_text[1].recall == pytest.approx(among) and 0 < among < 1
    assert found.image_to_text[1].recall == found.image_to_text[5].recall


def test_what_cannot_be_measured_is_said(made: tuple[VLM, Processor], samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="rerank is -1"):
        evaluate_retrieval(Assistant(*made, "cpu"), samples, rerank=-1)
    with pytest.raises(ValueError, match="not one picture and one answer"):
        evaluate_retrieval(Assistant(*made, "cpu"), [Sample.question("q", (b"a", b"b"), "?", "!")])
    plain, processor = eyespot.build(VISION, {"name": "mlp"}, GPT)
    with pytest.raises(ValueError, match="no alignment head"):
        evaluate_retrieval(Assistant(plain, processor, "cpu"), samples)


def test_odds_are_logarithms_of_odds(made: tuple[VLM, Processor], samples: list[Sample]) -> None:
    assistant = Assistant(*made, "cpu")
    gallery = gallery_of(samples[:1])
    odds = match_odds(assistant, gallery, np.ones((1, 2), dtype=np.bool_), 1)
    assert all(math.isfinite(value) and value != 0 for value in odds[0])
