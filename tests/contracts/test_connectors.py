"""Every registered connector keeps the contract: float [N, P, E] -> float [N, K, D] with K = num_tokens(P)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eyespot.models.connectors.linear import LinearConnector
from eyespot.models.connectors.mlp import MLPConnector
from eyespot.models.connectors.pixel_shuffle import PixelShuffleConnector
from eyespot.models.vlm import VLM, build_connector
from eyespot.registry import CONNECTORS
from tiny import NUM_PATCHES, WIDTH, close, collate, make_rows, make_vlm

VISION_DIM = 24
PATCHES = 16
# arguments of each connector for 16 patches; several entries try several settings
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"bias": False}],
    "mlp": [
        {},
        {"depth": 1},
        {"depth": 3, "hidden_dim": 20, "norm": True},
        {"init": "default", "dropout": 0.5},
        {"factor": 2},
    ],
    "pixel_shuffle": [{}, {"factor": 1}, {"factor": 4, "bias": True}],
    "conv": [
        {"conv_dim": 16},
        {"depth": 2, "conv_dim": 32, "hidden_dim": 20},
        {"conv_dim": 16, "keep": 3},
        {"conv_dim": 16, "keep": 3, "boxes": True},
    ],
    "perceiver": [
        {"num_queries": 5, "depth": 2, "heads": 2, "head_dim": 8},
        {"num_queries": 1, "depth": 1, "heads": 3, "head_dim": 4, "mlp_ratio": 1.5},
    ],
    "qformer": [
        {"num_queries": 5, "hidden_dim": 16, "depth": 3, "heads": 2, "dropout": 0.0},
        {"num_queries": 2, "hidden_dim": 8, "depth": 1, "heads": 2, "mlp_dim": 12, "cross_every": 1, "dropout": 0.1},
    ],
}
CASES = [
    pytest.param({"name": name, **arguments}, id=f"{name}-{i}")
    for name in CONNECTORS
    for i, arguments in enumerate(ARGUMENTS.get(name, []))
]


def make(settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build_connector(settings, VISION_DIM, WIDTH)


def num_tokens(connector: nn.Module, num_patches: int) -> int:
    found: int = connector.num_tokens(num_patches)  # type: ignore[operator]
    return found


def features(num_images: int = 2) -> Tensor:
    return torch.randn(num_images, PATCHES, VISION_DIM, generator=torch.Generator().manual_seed(1))


def test_every_connector_is_tested() -> None:
    missing = [name for name in CONNECTORS if name not in ARGUMENTS]
    assert not missing, f"add tiny arguments of {missing} to ARGUMENTS in this file, so that the contract is tested"


@pytest.mark.parametrize("settings", CASES)
def test_shapes_and_token_counts(settings: dict[str, Any]) -> None:
    connector = make(settings).eval()
    out = connector(features()).detach()
    assert out.shape == (2, num_tokens(connector, PATCHES), WIDTH)
    assert out.dtype == torch.float32 and out.isfinite().all() and float(out.std()) > 0.01


@pytest.mark.parametrize("settings", CASES)
def test_pictures_do_not_meet(settings: dict[str, Any]) -> None:
    connector = make(settings).eval()
    together = connector(features(3))
    for i in range(3):
        close(connector(features(3)[i : i + 1])[0], together[i])
    assert connector(features(3)[:0]).shape == (0, num_tokens(connector, PATCHES), WIDTH)


@pytest.mark.parametrize("settings", CASES)
def test_gradients_reach_inputs_and_parameters(settings: dict[str, Any]) -> None:
    connector, inputs = make(settings).eval(), features().requires_grad_()
    connector(inputs).pow(2).sum().backward()
    counts = (inputs.grad.abs().sum(-1) > 0).sum(1)  # type: ignore[union-attr]
    assert (counts == PATCHES).all() or (settings.get("keep") and (counts >= settings["keep"]).all())
    for name, parameter in connector.named_parameters():
        if name.startswith("score."):  # which cells are kept is no smooth function of anything
            continue
        assert parameter.grad is not None, name
        # softmax takes away what a key's bias adds to all scores of a query: its gradient is zero but for rounding
        assert name.endswith("k_proj.bias") or float(parameter.grad.abs().sum()) > 1e-6, name


@pytest.mark.parametrize("settings", CASES)
def test_bfloat16(settings: dict[str, Any]) -> None:
    connector = make(settings).eval()
    expected = connector(features())
    out = connector.to(torch.bfloat16)(features().to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, 0.1)


@pytest.mark.parametrize("settings", CASES)
def test_evaluation_mode_is_deterministic_and_training_mode_works(settings: dict[str, Any]) -> None:
    connector = make(settings)
    assert connector.training
    varies = not torch.equal(connector(features()), connector(features()))
    assert varies is (settings.get("dropout", 0) > 0)
    connector.eval()
    assert torch.equal(connector(features()), connector(features()))


@pytest.mark.parametrize("settings", CASES)
def test_inside_a_vlm_and_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    arguments = {**settings}
    if settings["name"] == "pixel_shuffle":
        arguments["factor"] = min(2, settings.get("factor", 2))  # the tiny encoder has a grid of 2 x 2
    model = make_vlm("llama", connector=arguments)
    kept = num_tokens(model.connector, NUM_PATCHES)
    model.config.num_image_tokens = kept
    rows = make_rows()
    for row in rows:
        row.ids = shorten(row.ids, kept)
    with torch.no_grad():
        expected = model(**collate(rows)).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(VLM.from_pretrained(tmp_path).eval()(**collate(rows)).logits, expected)


def shorten(ids: list[int], num_image_tokens: int) -> list[int]:
    """Each run of NUM_PATCHES placeholders becomes one of another length."""
    found: list[int] = []
    i = 0
    while i < len(ids):
        is_run = ids[i] == 64
        found += [64] * num_image_tokens if is_run else [ids[i]]
        i += NUM_PATCHES if is_run else 1
    return found


# --- what each one is ----------------------------------------------------------------------------------------------


def test_linear_is_one_product() -> None:
    connector = LinearConnector(VISION_DIM, WIDTH)
    close(connector(features()), features() @ connector.proj.weight.T + connector.proj.bias)


def test_pixel_shuffle_joins_neighbours() -> None:
    """Token (r, c) of the result sees patches (2r, 2c), (2r, 2c + 1), (2r + 1, 2c), (2r + 1, 2c + 1), and no other."""
    connector = PixelShuffleConnector(1, 4, factor=2)
    connector.proj.weight.data = torch.eye(4)
    grid = torch.arange(16.0).view(1, 16, 1)  # a 4 x 4 grid, numbered row by row
    assert connector(grid)[0].int().tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("num_patches", "factor"),
    [(17, 2), (16, 3), (9, 2)],  # 17: a grid with CLS
)
def test_pixel_shuffle_names_what_does_not_fit(num_patches: int, factor: int) -> None:
    connector = PixelShuffleConnector(VISION_DIM, WIDTH, factor=factor)
    words = f"factor {factor} does not fit {num_patches} patches"
    with pytest.raises(ValueError, match=words):
        connector.num_tokens(num_patches)
    with pytest.raises(ValueError, match=words):
        connector(torch.zeros(1, num_patches, VISION_DIM))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "mlp", "depth": 0}, "mlp depth is 0; at least 1"),
        ({"name": "mlp", "hidden_dim": 0}, "mlp hidden_dim is 0; at least 1"),
        ({"name": "mlp", "init": "zero"}, "mlp init is 'zero'; choose xavier or default"),
        ({"name": "mlp", "factor": 0}, "mlp factor is 0; at least 1"),
        ({"name": "pixel_shuffle", "factor": 0}, "pixel_shuffle factor is 0; at least 1"),
        ({"name": "mpl"}, "unknown connector 'mpl'; did you mean 'mlp'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make(settings)


def test_xavier_weights_and_zero_biases() -> None:
    """Uniform within sqrt(6 / (fan in + fan out)), Glorot and Bengio 2010, equation 16."""
    connector = MLPConnector(VISION_DIM, WIDTH, depth=2)
    linear = [layer for layer in connector.layers if isinstance(layer, nn.Linear)]
    for layer in linear:
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max().item() <= bound
        assert not layer.bias.any()
    other = MLPConnector(VISION_DIM, WIDTH, depth=2, init="default")
    assert any(layer.bias.any() for layer in other.layers if isinstance(layer, nn.Linear))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_seed_b_projector() -> None:
    """Linear(1024, 960), GELU, LayerNorm, Linear(960, 960), in this order."""
    connector = MLPConnector(1024, 960, depth=2, hidden_dim=960, norm=True)
    kinds = [type(layer) for layer in connector.layers if not isinstance(layer, nn.Dropout)]
    assert kinds == [nn.Linear, nn.GELU, nn.LayerNorm, nn.Linear]
    assert count(connector) == (1024 * 960 + 960) + 2 * 960 + (960 * 960 + 960) == 1_908_480


def test_seed_a_projector() -> None:
    """Linear(1024, 2048), GELU, dropout, Linear(2048, 640): Gemma-3-270M is 640 wide."""
    connector = MLPConnector(1024, 640, depth=2, hidden_dim=2048, dropout=0.1)
    kinds = [type(layer) for layer in connector.layers]
    assert kinds == [nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
    assert count(connector) == (1024 * 2048 + 2048) + (2048 * 640 + 640) == 3_410_560


def test_the_default_hidden_width_is_twice_the_language_width() -> None:
    assert MLPConnector(10, 7).layers[0].out_features == 14
