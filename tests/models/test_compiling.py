"""Compiled layers compute what plain ones compute, under the same names."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from eyespot.models.compiling import compile_layers
from tiny import close, make_vlm, training_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]


def test_loss_and_gradients() -> None:
    torch.compiler.reset()
    plain = make_vlm("llama")
    plain.set_trainable(vision="full", connector="full", language="full")
    compiled = copy.deepcopy(plain)
    # 2 layers of the encoder, 2 of the language model
    assert compile_layers(compiled.language) == 2
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for indices in ((0, 1, 2, 3), (0, 2)):
        losses = []
        for model in (plain, compiled):
            model.train().zero_grad()
            loss = model(**training_batch(indices)).loss
            loss.backward()
            losses.append(float(loss.detach()))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None and b.grad is not None:
                close(b.grad, a.grad, 1e-4)
