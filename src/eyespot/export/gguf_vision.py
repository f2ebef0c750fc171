"""Vision encoder and connector as llama.cpp reads them from an mmproj file: its projector "mlp" (LLaVA 1.5).

It is the one projector around which llama.cpp writes no tokens of its own and which attends causally. Its graph
(tools/mtmd/models/llava.cpp of llama.cpp) is a ViT with an optional class token, and linear, GELU, linear behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eyespot.compose import picture_size
from eyespot.export.parity import refuse
from eyespot.models.connectors.linear import LinearConnector
from eyespot.models.connectors.mlp import MLPConnector
from eyespot.models.connectors.pixel_shuffle import PixelShuffleConnector
from eyespot.models.vision.pretrained import image_size_of
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Processor

if TYPE_CHECKING:
    from gguf import GGUFWriter

ENCODERS = ("clip_vision_model", "siglip_vision_model")
# erf and tanh GELU differ by at most 5e-4; llama.cpp has the second one only
GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new")
OTHERS = "export onnx or merged instead, or its language model alone as gguf_text"


def check_vision(model: VLM, processor: Processor) -> None:
    """Refuse what llama.cpp cannot compute between a picture and the language model."""
    config, vision = model.config, model.config.vision_config
    if vision.model_type not in ENCODERS:
        refuse("gguf", f"its encoder is {vision.model_type!r}, llama.cpp reads CLIP and SigLIP", OTHERS)
    if vision.hidden_act not in (*GELUS, "quick_gelu"):
        refuse("gguf", f"its encoder computes {vision.hidden_act!r}, llama.cpp GELU or quick GELU", OTHERS)
    if config.keep_cls:
        refuse("gguf", "its connector reads the class token, which llama.cpp drops", OTHERS)
    if config.vision_positions:
        refuse("gguf", "its connector is told the patches' places, which llama.cpp cannot do", OTHERS)
    if config.image_attention != "causal":
        refuse("gguf", "its image tokens see each other, in llama.cpp they look back only", OTHERS)
    if (size := picture_size(processor.image_processor)) != image_size_of(vision):
        refuse("gguf", f"its pictures have {size} pixels where the encoder knows {image_size_of(vision)}", OTHERS)
    two_layers(model)


def two_layers(model: VLM) -> tuple[nn.Linear, nn.Linear]:
    """The connector as linear, GELU, linear, with the scale of the image embeddings in the second layer."""
    connector = model.connector
    if getattr(connector, "factor", 1) > 1:
        refuse(
            "gguf",
            "its connector joins patches, and llama.cpp puts tokens of its own around the pictures of all projectors "
            "that do",
            OTHERS,
        )
    layers = [layer for layer in connector.modules() if isinstance(layer, nn.Linear)]
    plain = isinstance(connector, (LinearConnector, PixelShuffleConnector, MLPConnector))
    if not plain or len(layers) > 2 or any(isinstance(layer, nn.LayerNorm) for layer in connector.modules()):
        name = (model.config.connector or {}).get("name")
        refuse("gguf", f"its connector is {name!r} ({len(layers)} linear layers), llama.cpp has one or two", OTHERS)
    first, second = layers if len(layers) == 2 else through_gelu(layers[0])
    return first, scaled(second, model.config.image_scale)


def through_gelu(layer: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer as two with GELU between them: GELU(x) - GELU(-x) = x, whichever GELU it is."""
    both = nn.Linear(layer.in_features, 2 * layer.out_features)
    difference = nn.Linear(2 * layer.out_features, layer.out_features)
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.data
    identity = torch.eye(layer.out_features)
    both.weight.data = torch.cat([layer.weight.data, -layer.weight.data])
    both.bias.data = torch.cat([bias, -bias])
    difference.weight.data = torch.cat([identity, -identity], dim=1)
    difference.bias.data.zero_()
    return both, difference


def scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    """The layer whose output is ``factor`` times as large."""
    larger = nn.Linear(layer.in_features, layer.out_features)
    larger.weight.data = layer.weight.data * factor
    larger.bias.data = layer.bias.data * factor
    return larger


def num_layers_read(model: VLM) -> int:
    """How many layers of the encoder stand before the hidden state that the connector reads."""
    count, layer = int(model.config.vision_config.num_hidden_layers), model.config.vision_layer
    if layer is None:
        return count
    return layer if layer >= 0 else count + 1 + layer


def add_sizes(writer: GGUFWriter, model: VLM, processor: Processor) -> None:
    """What llama.cpp has to know before it reads tensors, and how it makes pixels of a picture."""
    vision, images = model.config.vision_config, processor.image_processor
    count = num_layers_read(model)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(image_size_of(vision))
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(model.language_dim)
    writer.add_vision_block_count(count)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([float(value) for value in images.image_mean])
    writer.add_vision_image_std([float(value) for value in images.image_std])
    writer.add_vision_use_gelu(vision.hidden_act in GELUS)
    writer.add_array("clip.vision.feature_layer", [count])


def vision_tensors(model: VLM) -> Iterator[tuple[str, Tensor]]:
    """Names of llama.cpp and tensors: the encoder up to the layer that is read, then the connector."""
    import gguf

    count = num_layers_read(model)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, count)
    late = tuple(f"encoder.layers.{i}." for i in range(count, model.config.vision_config.num_hidden_layers))
    # SigLIP's last hidden state is normalised, CLIP's is not, and neither is an earlier one
    normalised = model.config.vision_layer is None and model.config.vision_config.model_type.startswith("siglip")
    for name, tensor in model.vision.state_dict().items():
        if name.startswith(late) or (name.startswith("post_layernorm") and not normalised):
            continue
        yield names.get_name(f"vision_tower.vision_model.{name}", (".weight", ".bias")), tensor
    for index, layer in zip((0, 2), two_layers(model), strict=True):
        yield f"mm.{index}.weight", layer.weight.data
        yield f"mm.{index}.bias", layer.bias.data
