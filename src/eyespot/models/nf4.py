"""Frozen weights in four bits under adapters (QLoRA, arXiv 2305.14314), through bitsandbytes.

A linear layer's weight is kept as 4-bit NormalFloat with a scale for each 64 values, the scales themselves in eight
bits, and unpacked for every product: 0.52 bytes for a weight in place of 2.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor, nn

from eyespot.config import ConfigError


def check_nf4() -> None:
    """Raise ConfigError unless this machine can hold weights in four bits."""
    cure = "drop model.language.quantize, or train on such a machine"
    if not torch.cuda.is_available():
        raise ConfigError(f"model.language.quantize is nf4, which needs a CUDA GPU, and there is none here; {cure}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.language.quantize is nf4, which needs a package that is not installed; run: "
            'pip install "eyespot[qlora]" (bitsandbytes)'
        )


def nf4_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` needs to load linear layers in four bits and compute in ``dtype``."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}


def is_nf4(module: nn.Module) -> bool:
    """Whether any weight of a module is kept in four bits."""
    return any(getattr(parameter, "quant_state", None) is not None for parameter in module.parameters())


def unpacked_state_dict(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The tensors of a module on the CPU, weights in four bits as the values that they stand for."""
    from bitsandbytes.functional import dequantize_4bit

    parameters: dict[str, Any] = dict(module.named_parameters())
    packed = {name: p for name, p in parameters.items() if getattr(p, "quant_state", None) is not None}
    tensors = {}
    for name, tensor in module.state_dict().items():
        if (parameter := packed.get(name)) is not None:
            tensors[name] = dequantize_4bit(parameter.data, parameter.quant_state).to(dtype).cpu()
        elif not any(name.startswith(f"{weight}.") for weight in packed):  # else the scales of a packed weight
            tensors[name] = tensor.detach().cpu()
    return tensors
