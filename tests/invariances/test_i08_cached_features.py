"""I8: features from the cache are those of the step: the same losses and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from eyespot.compose import build_from_settings
from eyespot.config import ConnectorSettings, LanguageSettings, ModelSettings, VisionSettings
from eyespot.data.collate import Collator
from eyespot.data.features import FeatureStore, fill
from eyespot.data.sample import Sample

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("row_length", [None, 64])
@pytest.mark.parametrize("train", ["full", "lora", "frozen"])
def test_losses_and_gradients(tmp_path: Path, row_length: int | None, train: str) -> None:
    torch.manual_seed(0)
    model, processor = build_from_settings(
        ModelSettings(
            VisionSettings("vit", {"image_size": 16, "patch_size": 8, **SIZES}, train="frozen"),
            ConnectorSettings("mlp"),
            LanguageSettings("gpt", {"max_position_embeddings": 96, **SIZES}, train=train, tokenizer="byte"),  # type: ignore[arg-type]
        )
    )
    pictures = []
    for i, color in enumerate(("red", "teal", "gold")):
        pictures.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (20 + i, 30), color).save(pictures[-1])
    samples = [Sample.question(f"{i}{q}", p, q, "yes") for i, p in enumerate(pictures) for q in ("red?", "is it gold?")]
    samples.append(Sample.question("two", (pictures[2], pictures[0]), "same?", "no"))
    store = FeatureStore(tmp_path / "features")
    with torch.no_grad():
        assert fill(store, pictures, processor, model.encode_images, limit_bytes=1e9) == 3

    def step(features: FeatureStore | None) -> tuple[float, dict[str, torch.Tensor]]:
        window = Collator(processor, row_length=row_length, features=features)([samples])
        assert ("image_features" in window.batches[0]) == (features is not None)
        assert len(window.ids) == 7
        model.zero_grad()
        loss = model(**window.batches[0]).loss
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (loss, gradients), (cached_loss, cached_gradients) = step(None), step(store)
    assert cached_loss == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == cached_gradients.keys() and len(gradients) >= 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
