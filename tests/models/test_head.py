"""The head's product on few rows, in another order of the factors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from eyespot.models.head import FEW_ROWS, head_product


@pytest.mark.parametrize("number", [1, FEW_ROWS[0], 9, FEW_ROWS[-1], FEW_ROWS[-1] + 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_a_linear_layer(number: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(number, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    bias = torch.randn(50, requires_grad=True) if with_bias else None
    inputs = [states, weight, *([bias] if bias is not None else [])]
    ours, naive = head_product(states, weight, bias), F.linear(states, weight, bias)
    torch.testing.assert_close(ours, naive)
    assert ours.is_contiguous()
    factors = torch.randn(number, 50)
    for mine, theirs in zip(
        torch.autograd.grad((ours * factors).sum(), inputs), torch.autograd.grad((naive * factors).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


def test_autocast_and_other_dtypes_keep_theirs() -> None:
    states, weight = torch.randn(8, 4), torch.randn(9, 4)
    assert head_product(states.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert head_product(states, weight).dtype == torch.bfloat16
