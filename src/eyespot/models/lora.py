"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

SETTINGS = ("r", "alpha", "dropout", "targets", "bias")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMED_TARGETS = {"attention": ATTENTION, "all": ATTENTION + MLP}


def add_lora(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Put adapters on the linear layers of a part, in place.

    Args:
        module: a vision encoder or a language model.
        settings: r, alpha, dropout, bias ("none", "all", "lora_only") and targets: "attention" (q, k, v, o), "all"
            (with gate, up, down), "all-linear" (every linear layer but the head) or a list of layer names.

    Raises:
        ValueError: unknown setting or group of targets, or a name that no layer of the module has.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from eyespot.models.lora_linear import fuse

    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ValueError(f"unknown LoRA setting {unknown[0]!r}; settings: {', '.join(SETTINGS)}")
    layers = target_layers(module, settings.get("targets", "attention"))
    config = LoraConfig(
        r=settings.get("r", 64),
        lora_alpha=settings.get("alpha", 128),
        lora_dropout=settings.get("dropout", 0.0),
        bias=settings.get("bias", "none"),
        target_modules=layers,
        fan_in_fan_out=any(type(layer).__name__ == "Conv1D" for layer in module.modules()),
    )
    inject_adapter_in_model(config, module)
    fuse(module)
    for name, child in module.named_modules():
        if "lora_" in name:
            # transformers would draw B anew together with the whole model, but a new adapter must change nothing
            child._is_hf_initialized = True
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # bfloat16 masters would round small optimizer steps to zero


def merge_lora(module: nn.Module) -> None:
    """Add every adapter of a module to the weights it adapts, for good; what is left are the plain layers."""
    from peft.tuners.lora import LoraLayer

    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                setattr(parent, name, layer.get_base_layer())


def merge_adapter_folder(module: nn.Module, folder: str | Path) -> None:
    """Add the adapter of a folder that peft wrote to the weights it adapts; layers that it holds whole are replaced.

    Raises:
        ValueError: no adapter in safetensors there, or not exactly the tensors that it needs on this module.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    path = Path(folder)
    if not all((path / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        raise ValueError(f"{str(folder)!r} is no adapter; give a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    adapted: Any = get_peft_model(module, PeftConfig.from_pretrained(path))  # type: ignore[arg-type]
    wanted = set(get_peft_model_state_dict(adapted))
    tensors = load_file(path / ADAPTER_WEIGHTS)
    if difference := sorted(wanted ^ set(tensors)):
        raise ValueError(
            f"adapter {str(folder)!r} does not fit the model: {len(difference)} tensors are missing or left over, "
            f"first {difference[0]!r}; give the model that it was trained on"
        )
    set_peft_model_state_dict(adapted, tensors)
    adapted.merge_and_unload()


def target_layers(module: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the layers that get an adapter: of a named group those that the module has, of a list every one.

    Raises:
        ValueError: unknown group, or a name that no layer of the module has.
    """
    if isinstance(targets, str) and targets not in (*NAMED_TARGETS, "all-linear"):
        choices = ", ".join((*NAMED_TARGETS, "all-linear"))
        raise ValueError(f"lora.targets is {targets!r}; choose {choices} or a list of layer names")
    if targets == "all-linear":
        return linear_layers(module)
    wanted = NAMED_TARGETS[targets] if isinstance(targets, str) else targets
    names = {name.rpartition(".")[2] for name, _ in module.named_modules()}
    missing = [layer for layer in wanted if str(layer).rpartition(".")[2] not in names]
    if (not isinstance(targets, str) and missing) or len(missing) == len(wanted):
        raise ValueError(
            f"no layer of {type(module).__name__} is named {', '.join(map(str, missing))}; "
            f"set lora.targets to some of: {', '.join(linear_layers(module))}"
        )
    return [layer for layer in wanted if layer not in missing]


def is_adapter(name: str, bias: str) -> bool:
    """Whether a parameter trains together with the adapters.

    Args:
        name: of the parameter. bias: "none", "lora_only" (biases of the adapted layers) or "all".
    """
    trains_bias = bias == "all" or (bias == "lora_only" and "base_layer" in name)
    return "lora_" in name or (trains_bias and name.endswith("bias"))


def linear_layers(module: nn.Module) -> list[str]:
    """Last names of the linear layers of a module, without its output head."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    found = {
        name.rpartition(".")[2]
        for name, layer in module.named_modules()
        if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D") and layer is not head
    }
    return sorted(found)
