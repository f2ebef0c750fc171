"""Kept cells that say where they are: boxes in the digits of the language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import eyespot
from eyespot.compose import digit_embeddings
from eyespot.models.connectors.conv import ConvConnector

WIDTH = 32


def connector(keep: int = 2) -> ConvConnector:
    torch.manual_seed(0)
    made = ConvConnector(24, WIDTH, conv_dim=16, keep=keep, boxes=True)
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
        made.score.bias.fill_(0.0)
        half = made(features())
        made.score.bias.fill_(30.0)
        torch.testing.assert_close(half, (made(features()) + made.blank) / 2)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="conv boxes is true, but keep is null; say how many cells"):
        ConvConnector(24, WIDTH, conv_dim=16, boxes=True)


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
    embeddings = model.get_input_embeddings().weight
    ids = [processor.tokenizer(digit, add_special_tokens=False).input_ids[-1] for digit in "0123456789"]
    assert torch.equal(made.digits, embeddings[ids]) and len(set(ids)) == 10
    assert torch.equal(made.blank, digit_embeddings(model.language, processor.tokenizer)[1])
    torch.testing.assert_close(made.size, embeddings[ids].norm(dim=-1).mean())
    assert processor.num_image_tokens == 10
