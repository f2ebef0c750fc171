"""The head that finds objects: its losses against slow loops, and places against a grid drawn by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from eyespot.data.boxes import Box
from eyespot.data.boxes import iou as iou_of_boxes
from eyespot.models.detection import (
    Detection,
    Objects,
    box_loss,
    count_loss,
    generalized_iou,
    iou,
    name_loss,
    name_targets,
    name_vectors,
    word_loss,
)
from eyespot.models.vision.positions import grid_side, with_positions
from tiny import collate, make_rows, make_vlm


def boxes(number: int, seed: int = 0) -> Tensor:
    corners = torch.rand(number, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    return corners.flatten(1) * 0.8 + torch.tensor([0.0, 0.0, 0.2, 0.2])


OBJECTS = Objects(torch.tensor([0, 0, 1]), torch.tensor([2, 0, 2]), torch.tensor(
    [[0.0, 0.0, 0.2, 0.2], [0.7, 0.4, 0.9, 0.6], [0.9, 0.9, 1.0, 1.0]]
))  # fmt: skip


def slow_giou(a: list[float], b: list[float]) -> float:
    def area(box: list[float]) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    around = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    either = area(a) + area(b) - shared
    return shared / either - (around - either) / around


def test_generalized_iou() -> None:
    one, other = boxes(50), boxes(50, 1)
    expected = [slow_giou(a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    torch.testing.assert_close(generalized_iou(one, other), torch.tensor(expected))
    torch.testing.assert_close(generalized_iou(one, one), torch.ones(50))
    turned = one[:, [2, 3, 0, 1]]  # no boxes at all
    assert generalized_iou(turned, other).isfinite().all()


def test_iou_of_tensors_is_that_of_boxes() -> None:
    one, other = boxes(50), boxes(50, 1)
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    torch.testing.assert_close(iou(one, other), torch.tensor([iou_of_boxes(Box(*a), Box(*b)) for a, b in pairs]))
    assert (iou(one, other) >= generalized_iou(one, other) - 1e-6).all()


def test_an_object_belongs_to_the_cell_of_its_centre() -> None:
    assert OBJECTS.cells(16).tolist() == [0, 2 * 4 + 3, 15]
    edge = Objects(torch.tensor([0]), torch.tensor([0]), torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    assert edge.cells(16).tolist() == [15]
    targets = name_targets(OBJECTS, torch.Size((2, 16, 3)))
    assert targets.sum() == 3
    assert targets[0, 0, 2] == targets[0, 11, 0] == targets[1, 15, 2] == 1


def test_name_loss_is_a_sum_over_cells_and_names() -> None:
    logits = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0)) * 3
    targets = name_targets(OBJECTS, logits.shape)
    total = 0.0
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        likelihood = probability if target else 1 - probability
        total += -math.log(likelihood) * (probability - target) ** 2
    assert float(name_loss(logits, targets)) == pytest.approx(total, rel=1e-5)


def test_count_loss() -> None:
    logits = torch.tensor([[[2.0], [2.0], [-9.0]]])
    two = torch.tensor([[[1.0], [0.0], [1.0]]])
    total = 2 / (1 + math.exp(-2)) + 1 / (1 + math.exp(9))
    assert float(count_loss(logits, two)) == pytest.approx((total - 2) ** 2 / 2, rel=1e-4)  # smooth: squared below 1
    assert float(count_loss(logits, torch.zeros(1, 3, 1))) == pytest.approx(total - 0.5, rel=1e-5)


def test_word_loss() -> None:
    tokens = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    names = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for image, cell, name in ((0, 0, 2), (0, 11, 0), (1, 15, 2)):
        token, word = tokens[image, cell], names[name]
        total += 1 - float(token @ word) / (math.sqrt(float(token @ token)) * math.sqrt(float(word @ word)))
    assert float(word_loss(tokens, names, OBJECTS)) == pytest.approx(total, rel=1e-5)


def test_box_loss() -> None:
    one, other = boxes(7), boxes(7, 1)
    total = 0.0
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        total += 4 * sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 4 + 1 - slow_giou(a, b)
    assert float(box_loss(one, other, 16)) == pytest.approx(total, rel=1e-5)
    assert float(box_loss(one, one, 16)) == pytest.approx(0, abs=1e-5)
    assert float(box_loss(one[:0], one[:0], 16)) == 0  # a step without any object


def test_a_name_is_the_mean_of_its_words() -> None:
    table = nn.Embedding(5, 3)
    vectors = name_vectors(table, torch.tensor([[1, 3, 0], [5, 0, 0]]))
    torch.testing.assert_close(vectors[0], (table.weight[0] + table.weight[2]) / 2)
    torch.testing.assert_close(vectors[1], table.weight[4].detach())
    assert not vectors.requires_grad


def test_the_head_finds_a_name_by_direction_alone() -> None:
    head, names = Detection(3), torch.eye(3)
    tokens = torch.tensor([[[7.0, 0.0, 0.0], [0.0, 0.01, 0.0], [-1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])
    logits = head.name_logits(tokens, names)[0]
    assert logits.argmax(1)[:2].tolist() == [0, 1]
    torch.testing.assert_close(logits[0], logits[1][[1, 0, 2]])
    assert (logits[:2].amax(1) > 0).all() and (logits[2] < 0).all()
    assert head.boxes(tokens).shape == (1, 4, 4)


@pytest.mark.parametrize("frequencies", [1, 3])
def test_positions(frequencies: int) -> None:
    features = torch.randn(2, 9, 5)
    placed = with_positions(features, frequencies)
    assert torch.equal(placed[..., :5], features) and torch.equal(placed[0, :, 5:], placed[1, :, 5:])
    for patch in range(9):
        row, column = divmod(patch, 3)
        expected = [
            wave(math.pi * 2**i * (place + 0.5) / 3)
            for place in (column, row)
            for wave in (math.sin, math.cos)
            for i in range(frequencies)
        ]
        torch.testing.assert_close(placed[0, patch, 5:], torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert len(placed[0, :, 5:].unique(dim=0)) == 9
    assert with_positions(features, 0) is features


def test_no_place_without_a_grid() -> None:
    assert grid_side(16) == 4
    with pytest.raises(ValueError, match="10 tokens of a picture are no square grid"):
        with_positions(torch.zeros(1, 10, 4), 2)


def test_a_model_tells_its_connector_where_patches_are() -> None:
    model = make_vlm("llama", vision_positions=2)
    assert model.connector.layers[0].in_features == model.config.vision_config.hidden_size + 8
    batch = collate(make_rows())
    features = model.encode_images(batch["pixel_values"])
    same = features[:, :1].expand_as(features)  # the same patch everywhere
    embeds = model.embed_images(image_features=same)
    assert not torch.allclose(embeds[:, 0], embeds[:, -1])
