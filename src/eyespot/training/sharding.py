"""A model spread over processes: fully sharded data parallelism (arXiv 2304.11277) in PyTorch's per-parameter form.

Every layer of the language model is a group of its own, gathered when it computes. All other weights (encoder,
connector, embeddings, head) are one group that is gathered for the whole step: what they compute depends on whether a
process has a picture at hand, and a group that only some processes gather would make the others wait for ever.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eyespot.models.vlm import VLM


def shard(model: VLM, mesh: Any) -> None:
    """Leave in this process its piece of every weight, in place; names stay, gradients are averaged."""
    for module in model.language.modules():
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1:
            for layer in module:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all its pieces put together; then every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, value: Any) -> Any:
    """A whole tensor cut as a parameter is; anything but a tensor of its shape stays as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    # every process has read the whole value, so none has to send it
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights and the model computes without the others; all must enter."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(group is not model, recurse=False)
            group.reshard()
