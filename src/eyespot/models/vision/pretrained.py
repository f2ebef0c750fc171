"""Any vision model of transformers, by name or folder."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from eyespot.models.loading import check_complete


def vision_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision model with fresh weights, without its pooling head."""
    return without_pooler(AutoModel.from_config(config))


def load_vision(source: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A pretrained vision model: CLIP, SigLIP, SigLIP 2, ViT, DINOv2, DINOv3 or any other of transformers.

    Args:
        source: name on the Hub, or folder. Of a two-tower model (CLIP, SigLIP) only the vision tower is read.
        dtype: of the weights.

    Raises:
        ValueError: nothing can be loaded from ``source``, or some of its weights are missing.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        model_class: Any = AutoModel._model_mapping[type(config)]
        loaded = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_complete refuses them, and names the first
        )
    except (OSError, ValueError) as error:
        where = "the folder" if Path(source).exists() else "no such folder, and the Hub model"
        raise ValueError(f"vision encoder {source!r}: {where} cannot be read ({_first_line(error)})") from error
    model = without_pooler(loaded[0])
    check_complete(model, loaded[1], source)
    return model


def without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Remove what only makes one vector of a picture: it would be counted, kept and saved, but never used."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(getattr(module, "pooler", None), nn.Module):
            module.pooler = None
        if hasattr(module, "use_head") and isinstance(getattr(module, "head", None), nn.Module):
            module.use_head, module.head = False, None
    return model


def without_late_layers(model: PreTrainedModel, layer: int | None) -> int | None:
    """Remove the layers behind the hidden state that is read: they would be computed at every picture, and dropped.

    Args:
        layer: index into the hidden states (0 is before the first layer); None reads the last hidden state.

    Returns:
        The index of the same hidden state in what is left.

    Raises:
        ValueError: the encoder has no such hidden state.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    if layer is not None and count is not None and not -count - 1 <= layer <= count:
        raise ValueError(
            f"vision layer {layer} does not exist; {model.config.model_type} has {count} layers, so choose "
            f"{-count - 1} to {count}, or none for its last hidden state"
        )
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if layer is None or len(stacks) != 1:
        return layer
    needed = layer if layer >= 0 else len(stacks[0]) + 1 + layer
    if not 1 <= needed < len(stacks[0]):
        return layer
    del stacks[0][needed:]
    model.config.num_hidden_layers = needed
    return -1


def image_size_of(config: PreTrainedConfig) -> int:
    """Side of the square picture that an encoder reads, in pixels."""
    size = config.image_size
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def token_counts(config: PreTrainedConfig, size: int | None = None) -> tuple[int, int]:
    """(tokens before the patches, patches) of an encoder, found by running it without data on the meta device.

    Args:
        size: of the pictures that it will get, in pixels; by default its own.

    Raises:
        ValueError: the encoder takes no pictures of this size, or the patches do not form a square.
    """
    small = copy.deepcopy(config)
    if hasattr(small, "num_hidden_layers"):
        small.num_hidden_layers = 1
    size = image_size_of(config) if size is None else size
    with torch.device("meta"):
        model = without_pooler(AutoModel.from_config(small)).eval()
        pixels = torch.empty(1, getattr(config, "num_channels", 3), size, size, dtype=model.dtype)
        try:
            total = model(pixels).last_hidden_state.shape[1]
        except ValueError as error:
            raise ValueError(
                f"{config.model_type} reads pictures of {image_size_of(config)} pixels but its image processor makes "
                f"{size}; set the size in its preprocessor_config.json ({_first_line(error)})"
            ) from error
    prefix = 0
    if patch_size := getattr(config, "patch_size", None):
        prefix = total - (size // int(patch_size)) ** 2
    patches = total - prefix
    if prefix < 0 or math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"{config.model_type} gives {total} tokens for {size} pixels, which is no square of patches")
    return prefix, patches


def _first_line(error: Exception) -> Any:
    return str(error).strip().splitlines()[0]
