"""Layers behind the hidden state that is read are removed, and what is read stays the same."""

from __future__ import annotations

import pytest
import torch

from eyespot.models.vision.pretrained import without_late_layers
from tiny import ENCODERS, IMAGE_SIZE, vision_encoder


@pytest.mark.parametrize("name", sorted(ENCODERS))
@pytest.mark.parametrize("layer", [None, -1, -2, -3, 1, 2, 3, 0])
@torch.no_grad()
def test_what_is_read_stays_the_same(name: str, layer: int | None) -> None:
    model = vision_encoder(name).eval()
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    before = model(pixels, output_hidden_states=True)
    if layer is not None and layer > model.config.num_hidden_layers:
        with pytest.raises(ValueError, match=f"vision layer {layer} does not exist"):
            without_late_layers(model, layer)
        return
    total, count = sum(p.numel() for p in model.parameters()), model.config.num_hidden_layers
    found = without_late_layers(model, layer)
    after = model(pixels, output_hidden_states=True)
    if layer is None:
        assert found is None and torch.equal(after.last_hidden_state, before.last_hidden_state)
        return
    assert found is not None
    assert torch.equal(after.hidden_states[found], before.hidden_states[layer])
    needed = layer if layer >= 0 else count + 1 + layer
    if 1 <= needed < count:
        assert model.config.num_hidden_layers == needed
        assert sum(p.numel() for p in model.parameters()) < total
    else:
        assert sum(p.numel() for p in model.parameters()) == total
