"""The residual network: shapes, order of the grid, independence of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel

from eyespot.models.vision.convnet import EyespotConvNetModel, build_convnet

TINY = {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 2], "groups": 4}


def tiny(**changes: object) -> EyespotConvNetModel:
    torch.manual_seed(0)
    return build_convnet(**{**TINY, **changes}).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (2, 16, 16)),
        ({"stem_stride": 1, "image_size": 9}, (2, 25, 16)),
        ({"stem_stride": 2, "image_size": 33}, (2, 81, 16)),
        ({"image_size": 33}, (2, 25, 16)),
        ({"image_size": 64, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "groups": 32}, (2, 16, 128)),
    ],
)
def test_shapes(changes: dict[str, object], shape: tuple[int, int, int]) -> None:
    model = tiny(**changes)
    size = model.config.image_size
    output = model(torch.randn(2, 3, size, size))
    assert output.last_hidden_state.shape == shape == (2, model.config.num_tokens, model.config.hidden_size)
    assert output.hidden_states is None


def test_hidden_states_are_stem_and_stages() -> None:
    output = tiny()(torch.randn(1, 3, 32, 32), output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(1, 64, 8), (1, 64, 8), (1, 16, 16)]
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_grid_is_flattened_row_by_row() -> None:
    model = tiny(hidden_sizes=[4], depths=[1], stem_stride=1, groups=4)
    for module in model.modules():  # normalisation mixes the whole picture, and this test is about places
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    pixels = torch.zeros(1, 3, 32, 32)
    blank = model(pixels).last_hidden_state
    pixels[:, :, 20, 7] = 1.0
    changed = (model(pixels).last_hidden_state - blank)[0].abs().sum(dim=-1).view(32, 32).nonzero()
    assert changed.amin(dim=0).tolist() == [17, 4] and changed.amax(dim=0).tolist() == [23, 10]


def test_features_do_not_depend_on_the_neighbours_even_in_training() -> None:
    model = tiny().train()
    pictures = torch.randn(3, 3, 32, 32)
    together = model(pictures).last_hidden_state
    for index in range(3):
        alone = model(pictures[index : index + 1]).last_hidden_state
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_through_auto_model(tmp_path: Path) -> None:
    model = tiny(stem_stride=2)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, EyespotConvNetModel) and loaded.config.hidden_size == 16
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_default_size_has_the_parameters_of_a_resnet18_without_classifier() -> None:
    with torch.device("meta"):
        model = build_convnet()
    assert model.num_parameters() == 11_176_512  # 11,689,512 of ResNet-18 less 513,000 of its classifier
    assert model.config.num_tokens == 49


def test_gradients_reach_everything_with_and_without_checkpointing() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(pixels).last_hidden_state.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bfloat16_takes_float32_pictures() -> None:
    model, pixels = tiny(), torch.randn(1, 3, 32, 32)
    exact = model(pixels).last_hidden_state
    rounded = model.to(torch.bfloat16)(pixels).last_hidden_state
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.15, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depths": [1]}, r"hidden_sizes \[8, 16\] and depths \[1\]"),
        ({"groups": 3}, r"groups 3 does not divide the widths \[8, 16\]"),
        ({"stem_stride": 3}, "stem_stride is 3; choose 1, 2 or 4"),
        ({"image_size": 0}, "image_size is 0"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**changes)


def test_weights_keep_the_size_of_the_signal() -> None:
    """Source: arXiv 1502.01852, equation 14, for the weights that a backward pass crosses."""
    weight = tiny(hidden_sizes=[32, 64], depths=[1, 1]).stages[1][0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_wrong_image_size() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 16, 16\].*\[N, 3, 32, 32\]"):
        tiny()(torch.zeros(1, 3, 16, 16))
