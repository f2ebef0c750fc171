"""Two encoders as one: the same features as both by hand, each with its own preprocessing; saved and loaded whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, SiglipImageProcessorPil

import eyespot
from eyespot.compose import build, load_parts, save
from eyespot.config import ConfigError, check_vision
from eyespot.models.vision.fusion import EyespotFusionConfig, EyespotFusionModel, build_fusion, resample_grid
from eyespot.models.vision.pretrained import load_vision, token_counts
from eyespot.models.vlm import VLM
from tiny import PICTURE, close, randomise, vision_encoder

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
GPT = {"name": "gpt", "args": {"max_position_embeddings": 96, "hidden_size": 32, "num_hidden_layers": 1,
                               "num_attention_heads": 2}}  # fmt: skip
VIT: dict[str, Any] = {"name": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2,
                       "num_attention_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    vision_encoder("siglip").save_pretrained(folder)
    size = {"height": 16, "width": 16}
    SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its configuration names 40 pixels, but it reads any multiple of 8, as the real one (518, and 14)."""
    folder = tmp_path_factory.mktemp("dinov2")
    model = Dinov2Model(Dinov2Config(**{**PICTURE, "image_size": 40, "num_hidden_layers": 4, "mlp_ratio": 2}))
    randomise(model, 5)
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(siglip_folder: Path, dinov2_folder: Path) -> dict[str, Any]:
    return {
        "first": {"name": "pretrained", "source": str(siglip_folder)},
        "second": {"name": "pretrained", "source": str(dinov2_folder)},
    }


@pytest.fixture(scope="module")
def fusion(parts: dict[str, Any]) -> EyespotFusionModel:
    return build_fusion(**parts, second_size=16).eval()


def picture(side: int = 16) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def run(source: Path, pixels: Tensor, prefix: int = 0) -> Tensor:
    """One encoder by hand -> its patches, without the tokens before them."""
    features: Tensor = load_vision(str(source)).eval()(pixels).last_hidden_state[:, prefix:]
    return features


# --- what it computes --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_those_of_both_with_their_own_preprocessing(
    fusion: EyespotFusionModel, siglip_folder: Path, dinov2_folder: Path
) -> None:
    """A picture of the size that both read, so that no resizing hides a wrong mean or deviation."""
    for_siglip = SiglipImageProcessorPil.from_pretrained(siglip_folder)(picture(), return_tensors="pt").pixel_values
    for_dinov2 = BitImageProcessorPil.from_pretrained(dinov2_folder)(picture(), return_tensors="pt").pixel_values
    assert float((for_siglip - for_dinov2).abs().max()) > 0.3
    close(fusion.pixels_for_second(for_siglip), for_dinov2)
    found = fusion(for_siglip)
    by_hand = [run(siglip_folder, for_siglip), run(dinov2_folder, for_dinov2, prefix=1)]
    close(found.last_hidden_state, torch.cat(by_hand, dim=-1))
    assert found.hidden_states is None
    assert found.last_hidden_state.shape == (1, 4, fusion.config.hidden_size) == (1, 4, 48)


@pytest.mark.parametrize("layer", [-1, -2, -4])
@torch.no_grad()
def test_hidden_states_pair_from_the_last_backwards(
    fusion: EyespotFusionModel, siglip_folder: Path, dinov2_folder: Path, layer: int
) -> None:
    """3 layers beside 4: the shorter decides how many there are."""
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = load_vision(str(siglip_folder)).eval()(pixels, output_hidden_states=True).hidden_states
    for_second = (pixels / 2 + 0.5 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    second = load_vision(str(dinov2_folder)).eval()(for_second, output_hidden_states=True).hidden_states
    states = fusion(pixels, output_hidden_states=True).hidden_states
    assert (len(first), len(second), len(states)) == (4, 5, 4)
    close(states[layer], torch.cat([first[layer], second[layer][:, 1:]], dim=-1))


@pytest.mark.parametrize("size", [8, 24, 32])
@torch.no_grad()
def test_another_size_is_resized_from_the_unnormalised_picture(
    parts: dict[str, Any], dinov2_folder: Path, siglip_folder: Path, size: int
) -> None:
    model = build_fusion(**parts, second_size=size, resample_patches=True).eval()
    shown = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(shown, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    expected = torch.stack([(resized[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    pixels = shown * 2 - 1
    close(model.pixels_for_second(pixels), expected)
    second = run(dinov2_folder, expected, prefix=1)
    side = size // 8
    assert second.shape[1] == side**2
    grid = second.view(2, side, side, 24).permute(0, 3, 1, 2)
    on_first = F.interpolate(grid, size=(2, 2), mode="bilinear", align_corners=False, antialias=True)
    expected = torch.cat([run(siglip_folder, pixels), on_first.permute(0, 2, 3, 1).reshape(2, 4, 24)], dim=-1)
    close(model(pixels).last_hidden_state, expected)
    assert token_counts(model.config) == (0, 4)


def test_a_grid_is_resampled_in_its_own_order() -> None:
    """Columns that rise from left to right still do, and rows do not change."""
    columns = torch.arange(4.0).repeat(4).view(1, 16, 1)
    assert resample_grid(columns, 4).flatten().tolist() == resample_grid(columns, 4).view(2, 2)[0].tolist() * 2
    assert resample_grid(columns, 4).view(2, 2)[0].diff() > 1.5
    assert torch.equal(resample_grid(columns, 16), columns)
    assert resample_grid(columns.bfloat16(), 4).dtype == torch.bfloat16


def test_class_and_register_tokens_are_dropped(siglip_folder: Path, tmp_path: Path) -> None:
    vision_encoder("dinov2_registers").save_pretrained(tmp_path)
    BitImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    both = build_fusion(
        first={"name": "pretrained", "source": str(tmp_path)},
        second={"name": "pretrained", "source": str(siglip_folder)},
    )
    assert both.config.prefix_tokens == [3, 0]
    assert token_counts(both.config) == (0, 4)
    assert both.config.image_mean == pytest.approx(MEAN) and both.config.second_mean == [0.5] * 3


def test_a_fusion_can_be_part_of_another(parts: dict[str, Any]) -> None:
    inner = {"name": "fusion", **parts, "second_size": 16}
    three = build_fusion(first=inner, second={**VIT, "image_mean": [0.1, 0.2, 0.3]})
    assert three.config.hidden_size == 72 and three.config.image_size == 16
    assert three(torch.zeros(1, 3, 16, 16)).last_hidden_state.shape == (1, 4, 72)
    check_vision("fusion", {"first": inner, "second": VIT}, "model.vision")


# --- inside a VLM ------------------------------------------------------------------------------------------------


def composed(parts: dict[str, Any], **settings: Any) -> tuple[VLM, Any]:
    torch.manual_seed(0)
    vision = {"name": "fusion", "args": {**parts, "second_size": 16}, **settings}
    model, processor = build(vision, {"name": "mlp"}, GPT)
    return model.eval(), processor


@pytest.mark.parametrize("layer", [None, -2])
@torch.no_grad()
def test_a_model_is_composed_saved_and_loaded(parts: dict[str, Any], layer: int | None, tmp_path: Path) -> None:
    model, processor = composed(parts, layer=layer)
    assert (model.config.num_prefix_tokens, model.config.num_image_tokens) == (0, 4)
    assert isinstance(processor.image_processor, SiglipImageProcessorPil), "the first encoder's own"
    batch = processor.prompt_batch([([picture(20)], MESSAGES)])
    outputs = model.vision(batch["pixel_values"], output_hidden_states=True)
    chosen = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
    assert torch.equal(model.encode_images(batch["pixel_values"]), chosen)
    save(model, processor, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    assert saved["first_config"]["model_type"] == "siglip_vision_model"
    assert saved["second_config"]["model_type"] == "dinov2" and saved["second_config"]["image_size"] == 40
    loaded, loaded_processor = load_parts(tmp_path)
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)
    again = loaded_processor.prompt_batch([([picture(20)], MESSAGES)])
    assert torch.equal(again["pixel_values"], batch["pixel_values"])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_weights_of_both_are_those_on_the_disk(parts: dict[str, Any], siglip_folder: Path, dinov2_folder: Path) -> None:
    model, _ = composed(parts)
    for encoder, folder in ((model.vision.first, siglip_folder), (model.vision.second, dinov2_folder)):
        for name, tensor in load_vision(str(folder)).state_dict().items():
            assert torch.equal(encoder.state_dict()[name], tensor), name


def test_bfloat16_and_kernels_reach_both(parts: dict[str, Any], tmp_path: Path) -> None:
    model, processor = composed({"first": parts["first"], "second": VIT}, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.vision.parameters()} == {torch.bfloat16}
    kernels = [model.config.vision_config.first_config, model.config.vision_config.second_config]
    assert [config._attn_implementation for config in kernels] == ["sdpa", "sdpa"]
    save(model, processor, tmp_path)
    loaded = VLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert {parameter.dtype for parameter in loaded.vision.parameters()} == {torch.bfloat16}
    assert loaded.vision.first.config._attn_implementation == "eager"


def test_an_encoder_without_kernels_keeps_that_it_has_none() -> None:
    """A configuration that was used once can be built again; transformers would refuse sdpa for a convnet."""
    convnet = {"name": "convnet", "image_size": 16, "hidden_sizes": [8, 16], "depths": [1, 1], "groups": 4}
    model, _ = build({"name": "fusion", "args": {"first": VIT, "second": convnet}}, {"name": "linear"}, GPT)
    assert model.config.vision_config.second_config._attn_implementation == "eager"
    assert token_counts(model.config.vision_config) == (0, 4)


def test_adapters_in_both(parts: dict[str, Any]) -> None:
    lora = {"r": 2, "alpha": 4, "targets": ["q_proj"]}
    model, processor = composed(parts, train="lora", lora=lora)
    adapted = {name.split(".")[0] for name, p in model.vision.named_parameters() if p.requires_grad}
    assert adapted == {"first", "second"}
    batch = processor.prompt_batch([([picture()], MESSAGES)])
    model(**batch).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.vision.named_parameters() if "lora_B" in name)


# --- errors ------------------------------------------------------------------------------------------------------


def test_unequal_grids_name_both_and_the_cure(parts: dict[str, Any]) -> None:
    wanted = (
        r"the first encoder \(siglip_vision_model\) makes 2x2 patches of 16 pixels, the second \(dinov2\) 5x5 of 40; "
        r"make them equal with second_size or other encoders, or set resample_patches=true"
    )
    with pytest.raises(ValueError, match=wanted):
        build_fusion(**parts)


def test_a_size_that_the_second_encoder_does_not_read_is_refused_at_once(parts: dict[str, Any]) -> None:
    wanted = r"second encoder \(siglip_vision_model\) does not read pictures of 24 pixels; its own size is 16, leave"
    with pytest.raises(ValueError, match=wanted):
        build_fusion(first=parts["second"], second=parts["first"], second_size=24, resample_patches=True)


def test_class_tokens_cannot_be_kept(parts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.vision\.keep_cls is true, but eyespot_fusion gives no tokens"):
        composed(parts, keep_cls=True)


def test_arguments_of_both_encoders_are_checked_before_anything_loads() -> None:
    def refused(match: str, **arguments: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            build({"name": "fusion", "args": {"first": VIT, "second": VIT, **arguments}}, {"name": "mlp"}, GPT)

    refused(r"'vit' takes no argument 'patchsize'; did you mean 'patch_size'", second={**VIT, "patchsize": 8})
    refused(r"model\.vision\.args\.first\.patch_size is 'x'", first={**VIT, "patch_size": "x"})
    refused(r"model\.vision\.args\.second\.name is missing; choices: ", second={"source": "dino"})
    refused(r"model\.vision\.args\.second\.name: unknown vision encoder 'vitt'", second={"name": "vitt"})
    refused(r"takes no argument 'third'", third=VIT)


def test_pixels_without_known_normalisation_are_refused(siglip_folder: Path, tmp_path: Path) -> None:
    vision_encoder("siglip").save_pretrained(tmp_path)
    SiglipImageProcessorPil(do_normalize=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not normalise, so the pixels that it wants are not known"):
        build_fusion(
            first={"name": "pretrained", "source": str(siglip_folder)},
            second={"name": "pretrained", "source": str(tmp_path)},
        )


def test_the_packaged_settings_are_a_fusion_of_what_they_name() -> None:
    """Sizes of the real pair, on the meta device: 256 patches of 1152 + 1024."""
    file = Path(eyespot.__file__).parent / "configs" / "vision" / "siglip_dinov2.yaml"
    settings = yaml.safe_load(file.read_text())
    check_vision(settings["name"], settings["args"], "model.vision")
    config = EyespotFusionConfig(
        first_config={"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 224, "patch_size": 14,
                      "num_attention_heads": 16, "intermediate_size": 4304, "num_hidden_layers": 1},
        second_config={"model_type": "dinov2", "hidden_size": 1024, "image_size": 518, "patch_size": 14,
                       "num_attention_heads": 16, "num_hidden_layers": 1},
        second_size=settings["args"]["second_size"],
        prefix_tokens=[0, 1],
    )  # fmt: skip
    assert token_counts(config) == (0, 256) and config.hidden_size == 2176
