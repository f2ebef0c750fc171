"""The product of hidden states with the weight of a language model's head, the largest matrix of a small model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = range(5, 33)  # fewer are multiplied one by one anyway; of more, reading the weight is the smaller part


def head_product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: states float [S, D], weight [V, D], bias [V] or None -> [S, V].

    Of few rows on a CPU the time goes into reading the weight, and with the weight on the left it is read once as it
    lies (benchmarks/head.py).
    """
    as_usual = states.device.type != "cpu" or states.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if as_usual or len(states) not in FEW_ROWS:
        return F.linear(states, weight, bias)
    product = (weight @ states.t()).t().contiguous()
    return product if bias is None else product + bias
