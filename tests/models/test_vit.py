"""The vision transformer against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, ViTConfig, ViTModel

from eyespot.models.vision.vit import EyespotViTModel, build_vit

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny(**changes: object) -> EyespotViTModel:
    torch.manual_seed(0)
    return build_vit(**{**TINY, **changes}).eval()  # type: ignore[arg-type]


def theirs() -> ViTModel:
    torch.manual_seed(1)
    config = ViTConfig(**TINY, intermediate_size=128, layer_norm_eps=1e-6, attn_implementation="eager")
    model = ViTModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():  # zeros and ones would hide a forgotten bias or norm
        parameter.data.normal_(std=0.2)
    return model


NAMES = {
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "layernorm_before": "attention_norm",
    "layernorm_after": "mlp_norm",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}


def rename(key: str) -> str:
    for old, new in NAMES.items():
        key = key.replace(old, new)
    return "norm" + key.removeprefix("layernorm") if key.startswith("layernorm.") else key


def test_equals_transformers_vit_hidden_states_too() -> None:
    reference, model = theirs(), tiny(use_cls_token=True)
    model.load_state_dict({rename(key): value for key, value in reference.state_dict().items()}, strict=True)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True)
        found = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for ours, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [False, True])
def test_shapes_and_defaults(cls: bool) -> None:
    model = tiny(use_cls_token=cls)
    output = model(torch.randn(2, 3, 16, 16))
    assert output.last_hidden_state.shape == (2, model.config.num_tokens, 32) == (2, 16 + cls, 32)
    assert output.hidden_states is None
    assert model.config.intermediate_size == 128
    assert isinstance(model(torch.randn(1, 3, 16, 16), return_dict=False), tuple)


def test_patches_are_numbered_row_by_row() -> None:
    model = tiny(num_hidden_layers=0)
    model.embeddings.position_embedding.data.zero_()
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, :, 4:8, 8:12] = 1.0  # row 1, column 2 of a 4 x 4 grid
    tokens = model(pixels, output_hidden_states=True).last_hidden_state[0]
    differs = (tokens - tokens[0]).abs().amax(dim=-1) > 1e-6
    assert differs.nonzero().flatten().tolist() == [1 * 4 + 2]


def test_saved_and_loaded_through_auto_model(tmp_path: Path) -> None:
    model = tiny(use_cls_token=True, image_mean=[0.1, 0.2, 0.3])
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, EyespotViTModel)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config.image_mean == [0.1, 0.2, 0.3]
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_parameter_count_at_full_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build_vit()
    width, inner, layers, tokens = 768, 3072, 12, 196
    formula = 3 * 16 * 16 * width + width + tokens * width
    formula += layers * (4 * width * width + 2 * width * inner + inner + 9 * width) + 2 * width
    assert model.num_parameters() == formula == 85_797_120
    assert f"{formula:,}" in (EyespotViTModel.__doc__ or "")


def test_positions_start_random_and_norms_start_neutral() -> None:
    model = tiny(hidden_size=256, use_cls_token=True)
    assert model.embeddings.position_embedding.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert (model.norm.weight == 1).all() and (model.norm.bias == 0).all()


def test_wrong_image_size_names_both_sizes_and_the_cure() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 16\].*\[N, 3, 16, 16\].*resize"):
        tiny()(torch.zeros(1, 3, 32, 16))
    with pytest.raises(ValueError, match=r"\[1, 1, 16, 16\]"):
        tiny()(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 18}, "image_size 18 is not a multiple of patch_size 4; choose 16"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_channels": 0}, "num_channels is 0"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**changes)


def test_gradient_checkpointing_changes_memory_not_gradients() -> None:
    pixels = torch.randn(2, 3, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        model = tiny(use_cls_token=True).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            older = not hasattr(model, "is_activation_checkpointing")  # transformers before 5.23
            assert model.is_gradient_checkpointing if older else model.is_activation_checkpointing
        model(pixels).last_hidden_state.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dropout_acts_in_training_only() -> None:
    model, pixels = tiny(hidden_dropout=0.5), torch.randn(1, 3, 16, 16)
    assert torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    model.train()
    assert not torch.equal(model(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_bfloat16_takes_float32_pictures() -> None:
    model, pixels = tiny(), torch.randn(1, 3, 16, 16)
    exact = model(pixels).last_hidden_state
    rounded = model.to(torch.bfloat16)(pixels).last_hidden_state
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)


def test_the_conv_stem_sees_each_picture_alone_and_gives_the_same_grid() -> None:
    model = tiny(stem="conv", position_range=0.3)
    torch.manual_seed(1)
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        together = model(pixels).last_hidden_state
        alone = model(pixels[1:2]).last_hidden_state
    assert together.shape == (3, 16, 32) and model.config.num_tokens == 16
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    # 3 -> 16 -> 32 channels, each half the size, then 1x1
    kernels = [tuple(m.weight.shape) for m in model.embeddings.patch_embedding if isinstance(m, torch.nn.Conv2d)]
    assert kernels == [(16, 3, 3, 3), (32, 16, 3, 3), (32, 32, 1, 1)]
    assert abs(float(model.embeddings.position_embedding.detach().std()) - 0.3) < 0.03


def test_a_saved_conv_stem_loads(tmp_path: Path) -> None:
    model = tiny(stem="conv")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": "swin"}, "stem is 'swin'; choose patch or conv"),
        ({"stem": "conv", "image_size": 12, "patch_size": 6}, "patch_size 6 is no power of two"),
        ({"stem": "conv", "patch_size": 1}, "patch_size 1 is no power of two"),
        ({"stem": "conv", "patch_size": 8, "hidden_size": 20}, "hidden_size 20 is not a multiple of 32"),
    ],
)
def test_impossible_stems_are_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**change)
