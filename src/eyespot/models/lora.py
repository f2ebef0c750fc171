"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

SETTINGS = ("r", "alpha", "dropout", "targets", "bias")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NAMED_TARGETS = {"attention": ATTENTION, "all": ATTENTION + MLP}


def add_lora(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Put adapters on the linear layers of a part, in place.

    Args:
        module: a vision encoder or a language model.
        settings: r, alpha, dropout, bias ("none", "all", "lora_only") and targets: "attention" (q, k, v, o), "all"
            (with gate, up, down), "all-linear" (every linear layer but the head) or a list of layer names.

    Raises:
        ValueError: unknown setting, or no layer of the module has one of the target names.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ValueError(f"unknown LoRA setting {unknown[0]!r}; settings: {', '.join(SETTINGS)}")
    targets = settings.get("targets", "attention")
    layers = NAMED_TARGETS.get(targets, targets) if isinstance(targets, str) else targets
    if layers == "all-linear":
        layers = linear_layers(module)
    config = LoraConfig(
        r=settings.get("r", 64),
        lora_alpha=settings.get("alpha", 128),
        lora_dropout=settings.get("dropout", 0.0),
        bias=settings.get("bias", "none"),
        target_modules=list(layers),
    )
    names = {name.rpartition(".")[2] for name, _ in module.named_modules()}
    if not names & {str(layer).rpartition(".")[2] for layer in layers}:
        raise ValueError(
            f"no layer of {type(module).__name__} is named {', '.join(map(str, layers))}; "
            f"set lora.targets to some of: {', '.join(sorted(linear_layers(module)))}"
        )
    inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # bfloat16 masters would round small optimizer steps to zero


def linear_layers(module: nn.Module) -> list[str]:
    """Last names of the linear layers of a module, without its output head."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    found = {
        name.rpartition(".")[2]
        for name, layer in module.named_modules()
        if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D") and layer is not head
    }
    return sorted(found)
