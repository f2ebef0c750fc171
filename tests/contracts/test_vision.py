"""Every registered vision encoder keeps the contract: float [N, 3, H, W] -> float [N, P, E], and knows its P and E."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from eyespot.models.vision.pretrained import image_size_of, token_counts, vision_from_config
from eyespot.registry import VISION
from tiny import close

# arguments of each encoder, small; "pretrained" reads a folder that a fixture writes
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "pretrained": [{}],
    "efficientnet_lite": [
        {"pretrained": False, "image_size": 64},
        {"pretrained": False, "image_size": 32, "features": "blocks"},
    ],
    "vit": [
        {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
         "use_cls_token": True},
    ],
    "convnet": [
        {"image_size": 16, "hidden_sizes": [8, 16], "depths": [1, 1], "groups": 4},
        {"image_size": 24, "hidden_sizes": [8], "depths": [2], "groups": 2, "stem_stride": 1},
    ],
    "fusion": [
        {
            "first": {"name": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "use_cls_token": True},
            "second": {"name": "convnet", "image_size": 24, "hidden_sizes": [8], "depths": [2], "groups": 2,
                       "stem_stride": 1, "image_mean": [0.4, 0.5, 0.6]},
            "resample_patches": True,
        },
        {
            "first": {"name": "convnet", "image_size": 16, "hidden_sizes": [8], "depths": [1], "groups": 4},
            "second": {"name": "vit", "image_size": 24, "patch_size": 6, "hidden_size": 16, "num_hidden_layers": 3,
                       "num_attention_heads": 2},
        },
    ],
}  # fmt: skip
CASES = [pytest.param((name, i), id=f"{name}-{i}") for name in VISION for i in range(len(ARGUMENTS.get(name, [])))]


@pytest.fixture(scope="module", params=CASES)
def encoder(request: pytest.FixtureRequest, clip_folder: Path) -> PreTrainedModel:
    name, i = request.param
    arguments = dict(ARGUMENTS[name][i])
    if name == "pretrained":
        arguments["source"] = str(clip_folder)
    torch.manual_seed(0)
    model: PreTrainedModel = VISION[name](**arguments)
    return model.eval()


def pixels(encoder: PreTrainedModel, num: int = 2) -> Tensor:
    side = image_size_of(encoder.config)
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_every_encoder_is_tested() -> None:
    missing = [name for name in VISION if name not in ARGUMENTS]
    assert not missing, f"add tiny arguments of {missing} to ARGUMENTS in this file, so that the contract is tested"


@torch.no_grad()
def test_shapes_and_token_counts(encoder: PreTrainedModel) -> None:
    features = encoder(pixels(encoder)).last_hidden_state
    prefix, patches = token_counts(encoder.config)
    assert features.shape == (2, prefix + patches, encoder.config.hidden_size)
    assert features.dtype == torch.float32 and features.isfinite().all() and float(features.std()) > 0.001
    assert round(patches**0.5) ** 2 == patches


@torch.no_grad()
def test_hidden_states_are_tokens(encoder: PreTrainedModel) -> None:
    states = encoder(pixels(encoder), output_hidden_states=True).hidden_states
    assert len(states) > 1 and all(state.ndim == 3 and len(state) == 2 for state in states)


@torch.no_grad()
def test_pictures_do_not_meet(encoder: PreTrainedModel) -> None:
    batch = pixels(encoder, 3)
    together = encoder(batch).last_hidden_state
    for i in range(3):
        close(encoder(batch[i : i + 1]).last_hidden_state[0], together[i], 1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_gradients_reach_pixels_and_parameters(encoder: PreTrainedModel) -> None:
    encoder.zero_grad()
    inputs = pixels(encoder).requires_grad_()
    encoder(inputs).last_hidden_state.pow(2).sum().backward()
    assert inputs.grad is not None and float(inputs.grad.abs().sum()) > 0
    unused = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert all("post_layernorm" in name for name in unused), unused  # CLIP's is for its pooled output alone
    encoder.zero_grad()


@torch.no_grad()
def test_bfloat16(encoder: PreTrainedModel) -> None:
    copy = vision_from_config(encoder.config)
    copy.load_state_dict(encoder.state_dict())
    copy = copy.eval().to(torch.bfloat16)
    features = copy(pixels(encoder).to(torch.bfloat16)).last_hidden_state
    assert features.dtype == torch.bfloat16 and features.isfinite().all()
    expected = encoder(pixels(encoder)).last_hidden_state
    assert float((features.float() - expected).abs().mean()) < 0.05 * float(expected.abs().mean()) + 0.02


def test_training_mode_and_back(encoder: PreTrainedModel) -> None:
    before = encoder(pixels(encoder)).last_hidden_state
    encoder.train()
    assert encoder.training
    assert encoder(pixels(encoder)).last_hidden_state.isfinite().all()
    encoder.eval()
    assert torch.equal(encoder(pixels(encoder)).last_hidden_state, before)


@torch.no_grad()
def test_saved_alone(encoder: PreTrainedModel, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in info["missing_keys"] if "pooler" not in name and "head" not in name} == set()
    found = loaded.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in encoder.state_dict().items())
    # kernels may differ with where in memory the weights lie, so not to the last bit
    expected = encoder(pixels(encoder)).last_hidden_state
    torch.testing.assert_close(loaded.eval()(pixels(encoder)).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rebuilt_from_its_configuration(encoder: PreTrainedModel) -> None:
    """As from_pretrained of a VLM does it: same tensors, same names."""
    again = vision_from_config(encoder.config)
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in encoder.state_dict().items()}


def test_pictures_of_another_size_are_refused(encoder: PreTrainedModel) -> None:
    side = image_size_of(encoder.config)
    with pytest.raises(ValueError, match=rf"{side}"):
        encoder(torch.zeros(1, 3, side + 32, side + 32))


class SixTokens(nn.Module):
    dtype = torch.float32

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=torch.zeros(len(pixel_values), 6, 4))


@pytest.mark.parametrize(("patch_size", "expected"), [(None, None), (8, (2, 4)), (4, None)])
def test_tokens_that_form_no_square_are_refused(
    patch_size: int | None, expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 tokens of a picture of 16 pixels: two before 4 patches of 8, but neither all patches nor patches of 4."""
    monkeypatch.setattr(AutoModel, "from_config", lambda config: SixTokens())
    config = PreTrainedConfig(image_size=16, **({"patch_size": patch_size} if patch_size else {}))
    if expected is not None:
        assert token_counts(config) == expected
    else:
        with pytest.raises(ValueError, match="gives 6 tokens for 16 pixels, which is no square of patches"):
            token_counts(config)
