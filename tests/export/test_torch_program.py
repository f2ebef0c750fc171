"""The vision half as a program: equal embeddings for any number of pictures, in a process without eyespot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eyespot.export.parity import ExportError, ParityError, drawn_pictures, export_model
from eyespot.export.run_onnx import pixel_values
from eyespot.export.torch_program import check_batch, picture_facts, vision_program
from eyespot.inference import Assistant
from eyespot.processing.images import EyespotImageProcessor
from tiny import close, make_vlm

ALONE = """
import sys
sys.modules.update(dict.fromkeys(("eyespot", "transformers")))  # as if they were not installed
import torch
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
vision = torch.export.load(folder + "/vision.pt2").module()
save_file({"embeds": vision(load_file(folder + "/pixels.safetensors")["pixels"])}, folder + "/embeds.safetensors")
"""


def test_torch_export(assistant_of: Callable[..., Assistant], tmp_path: Path) -> None:
    assistant = assistant_of("clip", "llama", {"name": "mlp"}, vision={"train": "lora", "lora": {"r": 2, "alpha": 2}})
    found = export_model(assistant, "torch_export", tmp_path / "out")
    assert found.largest_difference < 1e-4 and len({row.answer for row in found.pictures}) > 1
    weights = torch.export.load(tmp_path / "out" / "vision.pt2").state_dict
    assert {name.partition(".")[0] for name in weights} == {"vision", "connector"}  # the language model is not in it
    facts = json.loads((tmp_path / "out" / "vision.json").read_text())
    for _, picture in drawn_pictures(3):
        ours = assistant.processor.pixel_values([picture])
        np.testing.assert_allclose(pixel_values(picture, facts), ours, rtol=0, atol=1e-6)
    runs_alone(assistant, tmp_path / "out")


def runs_alone(assistant: Assistant, folder: Path) -> None:
    """Five pictures at once, in a process in which eyespot cannot be imported."""
    pixels = assistant.processor.pixel_values([picture for _, picture in drawn_pictures(5)])
    save_file({"pixels": pixels}, folder / "pixels.safetensors")
    command = [sys.executable, "-I", "-c", ALONE, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with torch.inference_mode():
        close(load_file(folder / "embeds.safetensors")["embeds"], assistant.model.embed_images(pixels), 1e-4)


@pytest.mark.parametrize(
    ("vision", "connector"),
    [
        ("vit", {"name": "linear"}),
        ("siglip", {"name": "conv", "keep": 3, "boxes": True, "numbers": True, "from_left": True}),
        ("dinov2_registers", {"name": "perceiver"}),
    ],
)
def test_any_number_of_pictures(vision: str, connector: dict[str, Any]) -> None:
    model = make_vlm("llama", vision, connector=connector)
    program = vision_program(model, 16, "torch_export").module()
    for count in (1, 3):
        pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            wanted = model.embed_images(pixels)
        close(program(pixels) / wanted.abs().max(), wanted / wanted.abs().max(), 1e-5)


def test_pictures_that_change_places_are_found(assistant_of: Callable[..., Assistant]) -> None:
    assistant = assistant_of("vit", "gpt")
    check_batch(assistant.model.embed_images, assistant, "onnx")
    with pytest.raises(ParityError, match="other embeddings for three pictures at once"):
        check_batch(lambda pixels: assistant.model.embed_images(pixels.flip(0)), assistant, "onnx")


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
def test_our_image_processor(mode: str) -> None:
    processor = EyespotImageProcessor(size=30, resize_mode=mode, resample=2, image_mean=(0.1, 0.5, 0.9))
    facts: Any = json.loads(json.dumps(picture_facts(processor, "onnx")))
    assert facts["resize"] == mode
    for _, picture in drawn_pictures():
        wanted = processor(picture)["pixel_values"]
        np.testing.assert_allclose(pixel_values(picture, facts), wanted, rtol=0, atol=1e-6)


def test_other_preparation_is_refused() -> None:
    processor = EyespotImageProcessor(size=30)
    processor._normalise = lambda image: np.zeros((3, 30, 30), np.float32)  # type: ignore[method-assign]
    with pytest.raises(ExportError, match="EyespotImageProcessor prepares drawn picture 0"):
        picture_facts(processor, "torch_export")
