"""The vision half (encoder and connector) as a program of torch.export, which needs no eyespot to run.

``vision.pt2`` takes pixel_values float [N, 3, S, S], any N, and gives image_embeds float [N, K, D]; ``vision.json``
says how a picture becomes pixel_values. Source: https://docs.pytorch.org/docs/stable/export.html
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from eyespot.compose import picture_size
from eyespot.export.merged import without_adapters
from eyespot.export.parity import TOLERANCE, ParityError, Reply, drawn_pictures, refuse, reply
from eyespot.export.run_onnx import pixel_values
from eyespot.inference import Assistant
from eyespot.models.vlm import VLM
from eyespot.processing.images import EyespotImageProcessor

PROGRAM_FILE, FACTS_FILE = "vision.pt2", "vision.json"


class Vision(nn.Module):
    """Encoder, connector and ``image_scale``."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.vision, self.connector = model.vision, model.connector
        self.embed_images = model.embed_images

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.embed_images(pixel_values)


class TorchProgramConsumer:
    """The saved program, with its image embeddings read by our language model."""

    tolerance = TOLERANCE

    def __init__(self, folder: Path, assistant: Assistant) -> None:
        self.vision = torch.export.load(folder / PROGRAM_FILE).module()
        self.assistant = assistant

    def answer(self, picture: PIL.Image.Image, question: str, max_new_tokens: int) -> Reply:
        image_embeds = self.vision(self.assistant.processor.pixel_values([picture]))
        return reply(self.assistant, picture, question, max_new_tokens, image_embeds)


def export_torch_program(assistant: Assistant, folder: Path) -> TorchProgramConsumer:
    """Write the program, and how pictures are prepared for it."""
    facts = picture_facts(assistant.processor.image_processor, "torch_export")
    program = vision_program(without_adapters(assistant.model), facts["size"], "torch_export")
    torch.export.save(program, folder / PROGRAM_FILE)
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    consumer = TorchProgramConsumer(folder, assistant)
    check_batch(consumer.vision, assistant, "torch_export")
    return consumer


@torch.inference_mode()
def check_batch(embed: Callable[[Tensor], Tensor], assistant: Assistant, format: str) -> None:
    """Compare embeddings of three pictures at once; answers are about one picture, so they cannot tell.

    Args:
        embed: pixel_values float [N, 3, S, S] -> image_embeds float [N, K, D].

    Raises:
        ParityError: they differ by more than rounding.
    """
    pixels = assistant.processor.pixel_values([picture for _, picture in drawn_pictures(3)])
    wanted, found = assistant.model.embed_images(pixels), embed(pixels)
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= TOLERANCE:
        raise ParityError(
            f"the {format} export gives other embeddings for three pictures at once, with a difference of "
            f"{difference:.1e} (limit {TOLERANCE:.0e}); do not use it, and report the parts of this model"
        )


def vision_program(model: VLM, size: int, format: str) -> ExportedProgram:
    """Encoder and connector for any number of pictures.

    Args:
        model: without adapters. size: of the pictures, in pixels. format: for messages.
    """
    return traced(Vision(model), (torch.zeros(2, 3, size, size),), ({0: Dim.DYNAMIC},), format)


def traced(module: nn.Module, inputs: tuple[Any, ...], sizes: tuple[Any, ...], format: str) -> ExportedProgram:
    """The graph of a module in evaluation mode; ``sizes`` names the axes of each input that may vary.

    Raises:
        ExportError: a step depends on values in a way that no graph can say.
    """
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(module.eval(), inputs, dynamic_shapes=sizes, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:  # torch.export's own errors are of these kinds
        reason = str(error).strip().partition("\n")[0]
        refuse(format, f"torch.export cannot follow its {type(module).__name__} ({reason})", "export it as merged")


@contextmanager
def quiet() -> Iterator[None]:
    """PyTorch's exporters warn of their own use of what is deprecated, and of torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def picture_facts(image_processor: Any, format: str) -> dict[str, Any]:
    """How an image processor prepares pictures, in the words of ``eyespot.export.run_onnx.pixel_values``.

    Raises:
        ExportError: it does something else; found by comparing pixels.
    """
    facts = {"size": picture_size(image_processor), **_resizing(image_processor)}
    facts |= {"resample": int(image_processor.resample), "rescale_factor": float(image_processor.rescale_factor)}
    facts |= {name: [float(v) for v in getattr(image_processor, name)] for name in ("image_mean", "image_std")}
    for name, picture in drawn_pictures():
        wanted = image_processor(images=[picture], return_tensors="pt")["pixel_values"].numpy()
        if not np.allclose(pixel_values(picture, facts), wanted, rtol=0, atol=1e-5):
            kind = type(image_processor).__name__
            refuse(format, f"{kind} prepares {name} in a way that cannot be written down here", "export it as merged")
    return facts


def _resizing(image_processor: Any) -> dict[str, Any]:
    if isinstance(image_processor, EyespotImageProcessor):
        return {"resize": image_processor.resize_mode, "shorter_side": image_processor.size}
    if shorter := image_processor.size.get("shortest_edge"):
        return {"resize": "crop", "shorter_side": int(shorter)}
    return {"resize": "squash"}
