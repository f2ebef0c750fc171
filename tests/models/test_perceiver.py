"""The Perceiver Resampler against the one of Idefics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from eyespot.models.connectors.perceiver import PerceiverConnector
from tiny import close, randomise

SIZES: dict[str, Any] = {"num_queries": 5, "depth": 3, "heads": 3, "head_dim": 4}
VISION_DIM = 16

NAMES = {
    "latents_layer_norm": "query_norm",
    "context_layer_norm": "context_norm",
    "latents": "queries",
    "blocks.": "layers.",
    ".0.output_proj": ".0.o_proj",
    ".1.ln": ".mlp_norm",
    ".1.fc": ".up_proj",
    ".1.c_proj": ".down_proj",
}


def rename(key: str) -> str:
    if key.startswith("layer_norm."):
        return key.removeprefix("layer_")
    for old, new in NAMES.items():
        key = key.replace(old, new)
    parts = key.split(".")
    return ".".join(["layers", parts[1], "attention", *parts[3:]]) if parts[2:3] == ["0"] else key


def idefics() -> IdeficsPerceiverResampler:
    config = IdeficsConfig(vision_config={"embed_dim": VISION_DIM})
    sizes = {"embed_dim": VISION_DIM, "depth": 3, "n_heads": 3, "head_dim": 4, "n_latents": 5}
    model = IdeficsPerceiverResampler(config, **sizes)
    randomise(model)
    return model.eval()


def features(num_patches: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(2, num_patches, VISION_DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_patches", [1, 7, 30])
def test_equals_idefics(num_patches: int) -> None:
    reference, connector = idefics(), PerceiverConnector(VISION_DIM, 6, **SIZES)
    state = {rename(key): value for key, value in reference.state_dict().items()}
    missing, unexpected = connector.load_state_dict(state, strict=False)
    assert missing == ["proj.weight", "proj.bias"] and not unexpected
    with torch.no_grad():
        expected = reference(features(num_patches))
        assert float(expected.std()) > 0.1
        close(connector(features(num_patches)), connector.proj(expected))
        connector.proj = nn.Identity()
        close(connector(features(num_patches)), expected)


def test_any_number_of_patches_becomes_as_many_tokens() -> None:
    connector = PerceiverConnector(VISION_DIM, 6, **SIZES)
    for num_patches in (1, 7, 30):
        assert connector(features(num_patches)).shape == (2, 5, 6)
        assert connector.num_tokens(num_patches) == 5


def test_default_sizes_are_those_of_flamingo_and_counted_as_documented() -> None:
    with torch.device("meta"):
        connector = PerceiverConnector(1280, 640)
    assert connector.queries.shape == (64, 1280) and len(connector.layers) == 6
    width, attended, inner, depth = 1280, 16 * 96, 4 * 1280, 6
    formula = 64 * width + depth * (4 * width * attended + 2 * width * inner + 6 * width) + 2 * width
    formula += width * 640 + 640
    assert all(p.is_meta for p in connector.parameters())
    assert sum(p.numel() for p in connector.parameters()) == formula


def test_initial_weights() -> None:
    torch.manual_seed(0)
    connector = PerceiverConnector(128, 64, num_queries=64, depth=2, heads=4, head_dim=32)
    for name, parameter in connector.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize("name", ["num_queries", "depth", "heads", "head_dim"])
def test_sizes_below_one_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=f"perceiver {name} is 0; at least 1"):
        PerceiverConnector(VISION_DIM, 6, **{**SIZES, name: 0})


def test_a_feed_forward_without_width_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"perceiver mlp_ratio \* vision_dim is 0; at least 1"):
        PerceiverConnector(VISION_DIM, 6, **SIZES, mlp_ratio=0.01)
