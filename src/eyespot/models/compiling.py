"""torch.compile where it pays: one layer of each kind, compiled once and used by all its copies."""

from __future__ import annotations

from torch import nn


def compile_layers(model: nn.Module) -> int:
    """Compile every repeated layer in place, for sizes that change from batch to batch; returns how many there are.

    Layers of one class share their compiled code, so the warm-up is that of one layer, not of the whole model. Names
    of parameters stay. A part that does not learn runs without gradients and is compiled for that.

    Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1 and len(module) > 1:
            for layer in module:
                layer.compile(dynamic=True)
                count += 1
    return count
