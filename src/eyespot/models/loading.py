"""Weights read from a folder are complete, or it is an error: transformers would fill a gap with random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def check_complete(model: nn.Module, info: Mapping[str, Any], source: str) -> None:
    """Compare a loaded model with transformers' loading info; tensors that the model has no more are left aside.

    Args:
        model: what will be used, for example without the pooling head that it was loaded with.
        info: what ``from_pretrained(..., output_loading_info=True)`` tells.
        source: for the message.

    Raises:
        ValueError: a tensor of the model was not in the file, or had another shape.
    """
    used = set(model.state_dict())
    mismatched = {str(name if isinstance(name, str) else name[0]) for name in info["mismatched_keys"]}
    if gaps := sorted(used & (set(info["missing_keys"]) | mismatched)):
        raise ValueError(
            f"{source!r} lacks {len(gaps)} of {len(used)} tensors that its configuration asks for, first {gaps[0]!r}; "
            "the folder is damaged or holds another kind of model"
        )
