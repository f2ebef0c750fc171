"""I12: the pixel tensor is that of the encoder's own image processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from eyespot.compose import build, image_processor_for, load_parts, save
from eyespot.config import VisionSettings
from eyespot.models.vision.vit import EyespotViTConfig
from tiny import close, vision_encoder

SQUARE = {"height": 16, "width": 16}
# sizes, means and filters as the well-known checkpoints set them, but for 16 pixels
THEIRS: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE),
    "siglip": lambda: SiglipImageProcessorPil(size=SQUARE, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "hf_vit": lambda: ViTImageProcessorPil(size=SQUARE),
    "dinov2": lambda: BitImageProcessorPil(size={"shortest_edge": 18}, crop_size=SQUARE, do_convert_rgb=True),
}
GPT = {"name": "gpt", "args": {"max_position_embeddings": 64, "hidden_size": 16, "num_hidden_layers": 1,
                               "num_attention_heads": 2}}  # fmt: skip


def pictures() -> list[PIL.Image.Image]:
    """Wide, high, tiny, and exactly fitting."""
    random = np.random.default_rng(0)
    shapes = [(20, 31, 3), (40, 17, 3), (5, 6, 3), (16, 16, 3)]
    return [PIL.Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.mark.parametrize("name", list(THEIRS))
def test_pretrained_encoders(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    vision_encoder(name).save_pretrained(folder)
    THEIRS[name]().save_pretrained(folder)
    vision = {"name": "pretrained", "args": {"source": str(folder)}}
    model, processor = build(vision, {"name": "linear"}, GPT)
    expected = THEIRS[name]()(images=pictures(), return_tensors="pt")["pixel_values"]
    assert expected.shape == (4, 3, 16, 16)
    close(processor.pixel_values(pictures()), expected, 1e-6)
    own = AutoImageProcessor.from_pretrained(folder)(images=pictures(), return_tensors="pt")["pixel_values"]
    close(processor.pixel_values(pictures()), own, 1e-6)
    save(model, processor, tmp_path / "vlm")
    close(load_parts(tmp_path / "vlm")[1].pixel_values(pictures()), expected, 1e-6)


def test_files_bytes_and_pillow_pictures_are_the_same(tmp_path: Path, clip_folder: Path) -> None:
    processor = image_processor_for(
        VisionSettings("pretrained", {"source": str(clip_folder)}), vision_encoder("clip").config
    )
    vision = {"name": "pretrained", "args": {"source": str(clip_folder)}}
    _, whole = build(vision, {"name": "linear"}, GPT)
    picture = pictures()[0]
    picture.save(tmp_path / "a.png")
    found = whole.pixel_values([picture, str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()])
    expected = processor(images=[picture], return_tensors="pt")["pixel_values"]
    for pixels in found:
        close(pixels, expected[0], 1e-6)


@pytest.mark.parametrize(("mean", "std"), [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.1, 0.2, 0.3), (0.2, 0.3, 0.4))])
def test_our_encoders(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Squash, bicubic filter, mean and std of the encoder's configuration: what transformers' ViT processor does."""
    config = EyespotViTConfig(image_size=16, patch_size=8, image_mean=list(mean), image_std=list(std))
    ours = image_processor_for(VisionSettings("vit"), config)
    theirs = ViTImageProcessorPil(size=SQUARE, resample=3, image_mean=list(mean), image_std=list(std))
    expected = theirs(images=pictures(), return_tensors="pt")["pixel_values"]
    close(ours(images=pictures())["pixel_values"], expected, 1e-6)


def test_crop_is_that_of_clip() -> None:
    config = EyespotViTConfig(image_size=16, patch_size=8)
    ours = image_processor_for(VisionSettings("vit", resize="crop"), config)
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=SQUARE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = theirs(images=pictures(), return_tensors="pt")["pixel_values"]
    close(ours(images=pictures())["pixel_values"], expected, 1e-6)


def test_every_setting_changes_the_pixels() -> None:
    """The comparison above can fail: another mean, filter or crop is another tensor."""
    pixels = [THEIRS[name]()(images=pictures()[:1], return_tensors="pt")["pixel_values"] for name in THEIRS]
    for i, one in enumerate(pixels):
        for other in pixels[i + 1 :]:
            assert not torch.allclose(one, other, atol=1e-2)


def saved_with_another_size(name: str, folder: Path) -> dict[str, Any]:
    """An encoder whose image processor makes pictures of 24 pixels, another size than its configuration says."""
    vision_encoder(name).save_pretrained(folder)
    size = {"height": 24, "width": 24}
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size).save_pretrained(folder)
    return {"name": "pretrained", "args": {"source": str(folder)}}


def test_an_encoder_that_takes_other_sizes_gets_as_many_tokens_as_it_makes(tmp_path: Path) -> None:
    model, processor = build(saved_with_another_size("dinov2", tmp_path), {"name": "linear"}, GPT)
    assert model.config.num_image_tokens == processor.num_image_tokens == 9  # 24 / 8 squared; 16 pixels would give 4
    assert model.encode_images(processor.pixel_values(pictures())).shape[:2] == (4, 9)


def test_an_encoder_of_one_size_refuses_an_image_processor_of_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads pictures of 16 pixels but its image processor makes 24; set"):
        build(saved_with_another_size("clip", tmp_path), {"name": "linear"}, GPT)


def test_pictures_that_are_not_square_are_refused_at_composition(tmp_path: Path) -> None:
    vision = saved_with_another_size("dinov2", tmp_path)
    CLIPImageProcessorPil(size={"height": 16, "width": 32}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="32 x 16 pixels; eyespot needs square ones"):
        build(vision, {"name": "linear"}, GPT)
