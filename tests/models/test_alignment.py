"""Losses that compare pictures with texts, each against a loop, and the head and sides that feed them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import eyespot
from eyespot.compose import load_parts
from eyespot.models.alignment import (
    MAX_SCALE,
    Alignment,
    same_pairs,
    sample_negatives,
    sigmoid_contrastive,
    similarity,
    softmax_contrastive,
)
from eyespot.models.text_sides import LanguageSide, QFormerSide, text_side
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Processor
from tiny import close, randomise

LORA = {"r": 2, "alpha": 4, "targets": "attention"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **SIZES}}
QFORMER = {"name": "qformer", "args": {"num_queries": 3, "hidden_dim": 16, "depth": 2, "heads": 2, "dropout": 0.0}}
SIDES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qformer": (QFORMER, {"dim": 8, "max_text": 12, "tokenizer": "byte"}),
    "language": ({"name": "mlp"}, {"dim": 8, "max_text": 12}),
}
TEXTS = ["a red cat", "one", "two blue dogs"]


def make(side: str, **language: Any) -> tuple[VLM, Processor]:
    torch.manual_seed(0)
    connector, alignment = SIDES[side]
    gpt = {"name": "gpt", "args": {"max_position_embeddings": 64, **SIZES}, **language}
    model, processor = eyespot.build(VISION, connector, gpt, alignment=alignment)
    randomise(model)
    return model.eval(), processor


@pytest.fixture(scope="module", params=list(SIDES))
def made(request: pytest.FixtureRequest) -> tuple[VLM, Processor]:
    return make(request.param)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))


def words(processor: Processor, texts: list[str]) -> dict[str, Tensor]:
    """Texts alone and in conversations, as PairCollator gives them."""
    rows = [
        processor.encode_conversation(
            [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": text}]
        )
        for text in texts
    ]
    return {**processor.encode_texts(texts), **processor.pad(rows, "right")}


# --- losses ------------------------------------------------------------------------------------------------------


@pytest.fixture
def same() -> Tensor:
    """Rows 0 and 2 show one picture, 1 and 4 say the same; three rows of five are here."""
    image_keys, text_keys = torch.tensor([7, 8, 7, 9, 10]), torch.tensor([1, 2, 3, 4, 2])
    return same_pairs(image_keys[:3], text_keys[:3], image_keys, text_keys)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 3


def test_same_pairs(same: Tensor) -> None:
    assert same.int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]


def test_softmax_contrastive_is_a_mean_over_right_answers(logits: Tensor, same: Tensor) -> None:
    expected = 0.0
    for row, right in zip(logits.tolist(), same.tolist(), strict=True):
        total = math.log(sum(map(math.exp, row)))
        losses = [total - row[i] for i in range(5) if right[i]]
        expected += sum(losses) / len(losses)
    assert float(softmax_contrastive(logits, same)) == pytest.approx(expected, rel=1e-5)


def test_softmax_contrastive_without_repetitions_is_cross_entropy(logits: Tensor) -> None:
    expected = F.cross_entropy(logits, torch.arange(3), reduction="sum")
    close(softmax_contrastive(logits, torch.eye(3, 5, dtype=torch.bool)), expected)


def test_sigmoid_contrastive_asks_for_every_pair(logits: Tensor, same: Tensor) -> None:
    expected = 0.0
    for row, right in zip(logits.tolist(), same.tolist(), strict=True):
        for value, belongs in zip(row, right, strict=True):
            expected += math.log(1 + math.exp(-value if belongs else value))
    assert float(sigmoid_contrastive(logits, same)) == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_one_teaches_nothing_and_breaks_nothing() -> None:
    logits, same = torch.tensor([[3.0]], requires_grad=True), torch.ones(1, 1, dtype=torch.bool)
    loss = softmax_contrastive(logits, same)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and float(logits.grad) == 0
    assert not sample_negatives(logits, same, torch.zeros(1))[1].any()


def test_similarity_takes_the_closest_vector() -> None:
    images, texts = torch.randn(2, 3, 4), torch.randn(5, 4)
    found = similarity(images, texts)
    for i in range(2):
        for t in range(5):
            expected = max(float(images[i, q] @ texts[t]) for q in range(3))
            assert float(found[i, t]) == pytest.approx(expected, rel=1e-5)


def test_negatives_come_as_often_as_they_are_similar(logits: Tensor, same: Tensor) -> None:
    num_draws = 40_000
    draws = torch.rand(num_draws, generator=torch.Generator().manual_seed(0))
    for row, right in zip(logits, same, strict=True):
        places, found = sample_negatives(row.expand(num_draws, 5), right.expand(num_draws, 5), draws)
        assert found.all()
        weights = [0.0 if belongs else math.exp(value) for value, belongs in zip(row.tolist(), right, strict=True)]
        expected = torch.tensor(weights) / sum(weights)
        shares = torch.bincount(places, minlength=5) / num_draws
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)
        assert not shares[right].any()


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_negatives_at_the_ends_of_the_draw_are_allowed_ones(
    logits: Tensor, same: Tensor, draw: float, scale: float
) -> None:
    for right in (same, same.flip(1)):
        places, found = sample_negatives(scale * logits, right, torch.full((3,), draw))
        assert found.all() and not right[range(3), places].any()


def test_nothing_to_draw_is_said() -> None:
    same = torch.tensor([[True, True], [True, False]])
    places, found = sample_negatives(torch.zeros(2, 2), same, torch.tensor([0.5, 0.5]))
    assert found.tolist() == [False, True] and places[1] == 1


# --- head --------------------------------------------------------------------------------------------------------


def test_the_head_starts_as_its_papers_say() -> None:
    head = Alignment(16, dim=8)
    assert float(head.log_scale.detach().exp()) == pytest.approx(1 / 0.07)
    assert (
        float(head.sigmoid_log_scale.detach().exp()) == pytest.approx(10) and float(head.sigmoid_bias.detach()) == -10
    )
    for vectors in (head.image_vectors(torch.randn(2, 3, 16)), head.text_vectors(torch.randn(2, 16))):
        close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))


def test_the_scale_is_limited_and_can_come_back() -> None:
    head = Alignment(4, dim=2)
    with torch.no_grad():
        head.log_scale.fill_(9.0)
    head.limit_scale()
    assert float(head.log_scale.detach().exp()) == pytest.approx(MAX_SCALE)
    wrong = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    softmax_contrastive(head.log_scale.exp() * wrong, torch.eye(2, dtype=torch.bool)).backward()
    assert head.log_scale.grad is not None and float(head.log_scale.grad) > 0  # a step lowers it


def test_matching_averages_over_states() -> None:
    head = Alignment(4, dim=2)
    states = torch.randn(2, 3, 4)
    close(head.match_logits(states)[1], torch.stack([head.match(state) for state in states[1]]).mean(0))


# --- sides -------------------------------------------------------------------------------------------------------


def test_each_connector_has_its_side(made: tuple[VLM, Processor]) -> None:
    model, processor = made
    has_text = processor.text_tokenizer is not None
    assert type(text_side(model)) is (QFormerSide if has_text else LanguageSide)


@torch.no_grad()
def test_neighbours_and_padding_change_no_text_and_no_pair(made: tuple[VLM, Processor], features: Tensor) -> None:
    model, processor = made
    side = text_side(model)
    batch = words(processor, TEXTS)
    assert (batch["text_mask"].sum(1) < batch["text_mask"].shape[1]).any()
    images = side.images(features)
    together = side.text_states(batch), side.match_states(images, *(batch[name] for name in side.columns))
    for i, text in enumerate(TEXTS):
        alone = words(processor, [text])
        close(side.text_states(alone)[0], together[0][i])
        close(side.match_states(images[i : i + 1], *(alone[name] for name in side.columns))[0], together[1][i])


@torch.no_grad()
def test_a_pair_depends_on_picture_and_text(made: tuple[VLM, Processor], features: Tensor) -> None:
    model, processor = made
    side = text_side(model)
    batch = words(processor, ["a red cat", "a red cat", "a red cow"])
    shown = side.images(features[[0, 1, 0]])
    states = side.match_states(shown, *(batch[name] for name in side.columns))
    assert (states[0] - states[1]).abs().max() > 1e-3 and (states[0] - states[2]).abs().max() > 1e-3


@torch.no_grad()
def test_captions_are_scored_word_by_word(made: tuple[VLM, Processor], features: Tensor) -> None:
    """A loop in which every word is predicted by a pass over the words before it alone."""
    model, processor = made
    side = text_side(model)
    batch = words(processor, TEXTS)
    steps: Callable[[int], list[tuple[Tensor, int]]] = (
        (lambda i: qformer_steps(model, batch, features, i))
        if isinstance(side, QFormerSide)
        else (lambda i: language_steps(model, batch, features, i))
    )
    losses = [-float(scores.log_softmax(-1)[word]) for i in range(3) for scores, word in steps(i)]
    assert side.num_targets(batch) == len(losses)
    loss = side.caption_loss(side.images(features), batch, len(losses))
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def qformer_steps(model: VLM, batch: dict[str, Tensor], features: Tensor, i: int) -> list[tuple[Tensor, int]]:
    ids = batch["text_ids"][i][batch["text_mask"][i] == 1].tolist()
    assert model.config.alignment is not None
    start = model.config.alignment["decode_id"]
    connector: Any = model.connector
    found = []
    for place in range(1, len(ids)):
        before = torch.tensor([[start, *ids[1:place]]])
        states = connector.joint_states(features[i : i + 1], before, torch.ones_like(before), causal=True)[1]
        found.append((connector.text_logits(states[0, -1]), ids[place]))
    return found


def language_steps(model: VLM, batch: dict[str, Tensor], features: Tensor, i: int) -> list[tuple[Tensor, int]]:
    ids, labels = batch["input_ids"][i], batch["labels"][i]
    found = []
    for place in (labels != -100).nonzero().flatten().tolist():
        output = model(input_ids=ids[None, :place], image_features=features[i : i + 1])
        found.append((output.logits[0, -1], int(ids[place])))
    return found


@torch.no_grad()
def test_the_language_side_is_the_model_itself(features: Tensor) -> None:
    model, processor = make("language")
    side, batch = text_side(model), words(processor, TEXTS)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    output = model(**plain, image_features=features)
    images = side.images(features)
    close(side.caption_loss(images, batch, side.num_targets(batch)), output.loss)
    last = batch["attention_mask"].sum(1) - 1
    found = side.match_states(images, batch["input_ids"], batch["attention_mask"])
    close(found[:, 0], output.last_hidden_state[range(3), last])
    close(side.image_states(images)[:, 0], output.image_embeds.mean(1))


@torch.no_grad()
def test_pictures_that_see_themselves_do_so_in_pairs_too(features: Tensor) -> None:
    torch.manual_seed(0)
    gpt = {"name": "gpt", "args": {"max_position_embeddings": 64, **SIZES}}
    model, processor = eyespot.build(
        VISION, {"name": "mlp"}, gpt, image_attention="bidirectional", alignment={"dim": 8}
    )
    randomise(model)
    side, batch = text_side(model.eval()), words(processor, TEXTS)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], image_features=features)
    found = side.match_states(side.images(features), batch["input_ids"], batch["attention_mask"])
    close(found[:, 0], output.last_hidden_state[range(3), batch["attention_mask"].sum(1) - 1])


# --- texts -------------------------------------------------------------------------------------------------------


def test_texts_keep_their_ends_when_they_are_cut(made: tuple[VLM, Processor]) -> None:
    _, processor = made
    batch = processor.encode_texts(["x" * 99, "<eos>", ""])
    ids, mask = batch["text_ids"], batch["text_mask"]
    assert ids.shape == (3, 12) and mask.sum(1).tolist() == [12, 7, 2]
    last = processor.end_of_turn_id if processor.text_tokenizer is None else processor.text_tokenizer.eos_token_id
    assert [int(row[count - 1]) for row, count in zip(ids, mask.sum(1), strict=True)] == [last] * 3
    assert (ids[1, :6] != last).all()  # typed text is no special token


def test_a_model_without_head_says_so() -> None:
    gpt = {"name": "gpt", "args": {"max_position_embeddings": 64, **SIZES}}
    model, processor = eyespot.build(VISION, {"name": "mlp"}, gpt)
    assert model.alignment is None
    with pytest.raises(ValueError, match="no alignment head; train one with"):
        processor.encode_texts(["a"])
    with pytest.raises(ValueError, match=r"the model has no alignment head; compose it with model\.alignment"):
        model.set_trainable(alignment="full")


@torch.no_grad()
def test_head_and_text_tokenizer_are_saved(made: tuple[VLM, Processor], features: Tensor, tmp_path: Path) -> None:
    model, processor = made
    eyespot.save(model, processor, tmp_path / "model")
    loaded, again = load_parts((tmp_path / "model").rename(tmp_path / "moved"))
    batch = words(processor, TEXTS)
    for name, column in words(again, TEXTS).items():
        assert torch.equal(column, batch[name])
    for one, other in ((model, loaded), (loaded, model)):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    close(text_side(loaded).text_states(batch), text_side(model).text_states(batch))


# --- what learns -------------------------------------------------------------------------------------------------


def trainable(model: VLM) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_text_side_learns_with_the_head_only() -> None:
    model, _ = make("qformer")
    connector: Any = model.connector
    texts = {id(p) for p in connector.text_side()}
    names = {name for name, p in model.named_parameters() if id(p) in texts}
    assert names and not names & trainable(model)
    model.set_trainable(connector="full", alignment="full")
    assert names < trainable(model) and any(name.startswith("alignment.") for name in trainable(model))
    model.set_trainable(connector="full", alignment="frozen")
    assert not names & trainable(model) and trainable(model)


def test_full_means_the_weights_beside_adapters_not_the_adapters() -> None:
    model, _ = make("language", train="lora", lora=LORA)
    adapters = {name for name in trainable(model) if name.startswith("language.")}
    assert adapters and all("lora_" in name for name in adapters)
    model.set_trainable(language="full")
    weights = {name for name in trainable(model) if name.startswith("language.")}
    assert weights and not weights & adapters
    assert weights | adapters == {name for name, _ in model.named_parameters() if name.startswith("language.")}
