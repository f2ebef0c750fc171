"""Kept cells that say where they are: boxes in the digits of the language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import eyespot
from eyespot.compose import digit_embeddings
from eyespot.data.boxes import Box
from eyespot.data.boxes import iou as iou_of_two
from eyespot.models.connectors.conv import HALF_FULL, SAME_NAME, SAME_PLACE, Cells, ConvConnector, distinct

WIDTH = 32


def connector(keep: int = 2, numbers: bool = False) -> ConvConnector:
    torch.manual_seed(0)
    made = ConvConnector(24, WIDTH, conv_dim=16, keep=keep, boxes=True, numbers=numbers)
    made.learn_digits(torch.eye(WIDTH)[:10] * 3, torch.eye(WIDTH)[31] * 3)
    return made.eval()


def features() -> Tensor:
    return torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_a_kept_cell_says_its_name_and_the_digits_of_its_edges() -> None:
    made, inputs = connector(), features()
    with torch.no_grad():
        assert made.score is not None
        made.score.bias += 100  # every cell is full
        tokens, cells = made(inputs).unflatten(1, (2, 5)), made.all_cells(inputs)
    assert cells.scores is not None and cells.boxes is not None
    for picture in range(3):
        kept = cells.scores[picture].topk(2).indices.sort().values
        for said, cell in zip(tokens[picture], kept.tolist(), strict=True):
            name = cells.tokens[picture, cell]
            torch.testing.assert_close(said[0], name / name.norm() * 3)
            for token, edge in zip(said[1:], cells.boxes[picture, cell].tolist(), strict=True):
                tenth = min(max(edge * 10 - 0.5, 0.0), 9.0)
                low = min(int(tenth), 8)
                expected = torch.zeros(WIDTH)
                expected[low], expected[low + 1] = 3 * (1 - tenth + low), 3 * (tenth - low)
                torch.testing.assert_close(token, expected, atol=1e-4, rtol=1e-4)


def random_cells(pictures: int = 4, number: int = 25) -> Cells:
    """Many boxes overlap, and there are few names."""
    chance = torch.Generator().manual_seed(2)
    corners = torch.rand(pictures, number, 2, generator=chance) * 0.3
    boxes = torch.cat([corners, corners + 0.3 + 0.3 * torch.rand(pictures, number, 2, generator=chance)], dim=-1)
    words = torch.eye(WIDTH)[torch.randint(3, (pictures, number), generator=chance)]
    blurred = words + 0.05 * torch.randn(words.shape, generator=chance)
    return Cells(blurred, torch.randn(pictures, number, generator=chance), boxes)


def one_by_one(tokens: Tensor, scores: Tensor, boxes: Tensor) -> list[int]:
    """Cells of one picture that repeat no better one, best first."""
    kept: list[int] = []
    for cell in scores.argsort(descending=True).tolist():
        near = [k for k in kept if iou_of_two(Box(*boxes[k].tolist()), Box(*boxes[cell].tolist())) > SAME_PLACE]
        if all(torch.cosine_similarity(tokens[k], tokens[cell], dim=0) <= SAME_NAME for k in near):
            kept.append(cell)
    return kept


@pytest.mark.parametrize("number", [1, 4, 8])
def test_nothing_is_kept_twice(number: int) -> None:
    cells = random_cells()
    assert cells.scores is not None and cells.boxes is not None
    kept, new = distinct(cells, number)
    assert new.all()
    for picture, rows in enumerate(zip(cells.tokens, cells.scores, cells.boxes, strict=True)):
        expected = one_by_one(*rows)
        assert len(expected) < 25, "something repeats"
        assert kept[picture].tolist() == sorted(expected[:number])


def test_where_there_is_less_than_is_kept_repeats_are_blank() -> None:
    made = connector(keep=3)
    assert made.edges is not None and made.score is not None
    with torch.no_grad():
        made.edges.weight.zero_()
        made.edges.bias.copy_(torch.tensor([-9.0, -9.0, 9.0, 9.0]))  # all cells have nearly the same box ...
        for parameter in made.project.parameters():
            parameter.zero_()
        made.project.layers[-1].bias.fill_(1.0)  # ... and the same name
        made.score.bias += 100
        tokens = made(features()).unflatten(1, (3, 5))
    blanks = (tokens == made.blank).all(-1).all(-1)
    assert blanks.sum(1).tolist() == [2, 2, 2]


def test_a_kept_cell_says_how_many_say_its_name() -> None:
    made = connector(keep=5, numbers=True)
    assert made.score is not None
    with torch.no_grad():
        made.score.bias += 100
        made.project.layers[-1].weight[2:] = 0  # in a plane some names are alike and others are not
        made.project.layers[-1].bias.zero_()
        made.project.layers[-1].bias[:2] = -made.all_cells(features()).tokens.mean((0, 1))[:2]
        cells = made.all_cells(features())
        tokens = made(features()).unflatten(1, (5, 6))
        plain = connector(keep=5)
        plain.load_state_dict(made.state_dict())
        torch.testing.assert_close(tokens[:, :, [0, 2, 3, 4, 5]], plain(features()).unflatten(1, (5, 5)))
    kept, _ = distinct(cells, 5)
    numbers = tokens[:, :, 1, :10].argmax(-1)
    for picture in range(3):
        said = [cells.tokens[picture, cell] for cell in kept[picture]]
        same = [sum(torch.cosine_similarity(one, other, dim=0).item() > SAME_NAME for other in said) for one in said]
        assert numbers[picture].tolist() == same
    assert len(numbers.unique()) > 1
    with torch.no_grad():
        made.score.weight.zero_()
        made.score.bias.fill_(HALF_FULL - 0.01)  # half a cell is not counted
        none = made(features()).unflatten(1, (5, 6))[:, :, 1]
    expected = made.blank + (torch.sigmoid(torch.tensor(-0.04))) * (made.digits[0] - made.blank)
    torch.testing.assert_close(none, expected.expand_as(none))


def test_names_are_said_once_more_from_left_to_right() -> None:
    made = connector(keep=6)
    plain = ConvConnector(24, WIDTH, conv_dim=16, keep=6, boxes=True)
    plain.load_state_dict(made.state_dict())
    made.from_left = True
    with torch.no_grad():
        assert made.score is not None and plain.score is not None
        made.score.bias += 1
        plain.score.bias += 1
        tokens, expected, cells = made(features()), plain.eval()(features()), made.all_cells(features())
    assert made.num_tokens(16) == tokens.shape[1] == 36
    torch.testing.assert_close(tokens[:, :30], expected, rtol=0, atol=0)
    assert cells.boxes is not None
    kept, _ = distinct(cells, 6)
    for said, again, chosen, boxes in zip(
        expected.unflatten(1, (6, 5)), tokens[:, 30:], kept, cells.boxes, strict=True
    ):
        middles = [(boxes[cell, 0] + boxes[cell, 2]).item() for cell in chosen]
        order = sorted(range(6), key=middles.__getitem__)
        assert order != list(range(6))
        torch.testing.assert_close(again, said[order, 0], rtol=0, atol=0)


@pytest.mark.parametrize("from_left", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_every_token_knows_its_cell(numbers: bool, from_left: bool) -> None:
    """Names and edges tell which cell they are from; cells that repeat a better one are not among them."""
    made = connector(keep=6, numbers=numbers)
    made.from_left = from_left
    with torch.no_grad():
        assert made.score is not None
        made.score.bias += 100
        made.project.layers[-1].weight.zero_()  # one name, so that boxes decide what is a repeat
        made.project.layers[-1].bias.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)))
        tokens, cells, found = made(features()), made.all_cells(features()), made.cells_of_tokens(features())
    assert found.shape == tokens.shape[:2] == (3, made.num_tokens(16))
    assert cells.scores is not None and cells.boxes is not None
    per_cell = 5 + numbers
    best = cells.scores.topk(6, dim=1).indices.sort(dim=1).values
    assert not torch.equal(found[:, : 6 * per_cell : per_cell], best)
    edges = made._spoken(cells.boxes * 10 - 0.5)  # [N, P, 4, D]
    kept, new = distinct(cells, 6)
    for picture in range(3):
        told = found[picture, : 6 * per_cell].view(6, per_cell)
        assert told.tolist() == [[cell] * per_cell for cell in kept[picture].tolist()]
        for row, cell in enumerate(kept[picture].tolist()):
            if new[picture, row]:
                last = tokens[picture, (row + 1) * per_cell - 1]
                torch.testing.assert_close(last, edges[picture, cell, 3])
        again = found[picture, 6 * per_cell :].tolist()
        middles = [(cells.boxes[picture, cell, 0] + cells.boxes[picture, cell, 2]).item() for cell in again]
        assert middles == sorted(middles) and sorted(again) == (sorted(kept[picture].tolist()) if from_left else [])


def test_boxes_of_a_new_model_lie_around_their_cells() -> None:
    made = connector()
    with torch.no_grad():
        assert made.edges is not None
        made.edges.weight.zero_()
        boxes = made.all_cells(features()).boxes
    assert boxes is not None
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.125 - 0.12, 0.125 - 0.12, 0.125 + 0.12, 0.125 + 0.12]))
    torch.testing.assert_close(boxes[0, 7], torch.tensor([0.875 - 0.12, 0.375 - 0.12, 0.875 + 0.12, 0.375 + 0.12]))


def test_empty_cells_fade_into_the_blank() -> None:
    made = connector()
    with torch.no_grad():
        assert made.score is not None
        made.score.weight.zero_()
        made.score.bias.fill_(-30.0)
        torch.testing.assert_close(made(features()), made.blank.expand(3, 10, WIDTH))
        made.score.bias.fill_(HALF_FULL)
        half = made(features())
        made.score.bias.fill_(30.0)
        torch.testing.assert_close(half, (made(features()) + made.blank) / 2)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="conv boxes is true, but keep is null; say how many cells"):
        ConvConnector(24, WIDTH, conv_dim=16, boxes=True)

    with pytest.raises(ValueError, match="conv numbers is true, but boxes is false"):
        ConvConnector(24, WIDTH, conv_dim=16, keep=2, numbers=True)

    with pytest.raises(ValueError, match="conv from_left is true, but boxes is false"):
        ConvConnector(24, WIDTH, conv_dim=16, keep=2, from_left=True)


def test_a_built_model_speaks_the_digits_of_its_language_model() -> None:
    vision = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1,
                                      "num_attention_heads": 2}}  # fmt: skip
    language: dict[str, Any] = {
        "name": "gpt", "tokenizer": "char:0123456789 abc\n",
        "args": {"max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    }  # fmt: skip
    model, processor = eyespot.build(
        vision, {"name": "conv", "args": {"conv_dim": 16, "keep": 2, "boxes": True}}, language
    )
    made: Any = model.connector
    embeddings = model.get_input_embeddings().weight.float()
    ids = [processor.tokenizer(digit, add_special_tokens=False).input_ids[-1] for digit in "0123456789"]
    assert torch.equal(made.digits, embeddings[ids]) and len(set(ids)) == 10
    assert torch.equal(made.blank, digit_embeddings(model.language, processor.tokenizer)[1].float())
    torch.testing.assert_close(made.size, embeddings[ids].norm(dim=-1).mean())
    assert processor.num_image_tokens == 10
