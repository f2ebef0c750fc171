"""The whole against transformers' LLaVA, and the vision encoders as they come from saved folders."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from eyespot.models.language.pretrained import load_language
from eyespot.models.vision.pretrained import load_vision, token_counts
from eyespot.models.vlm import VLM
from eyespot.processing.tokenizers import byte_tokenizer
from tiny import (
    ENCODERS,
    NUM_PATCHES,
    NUM_PREFIX,
    VOCAB,
    close,
    collate,
    language_model,
    make_rows,
    make_vlm,
    randomise,
    vision_encoder,
)

IMAGE_ID = VOCAB - 1  # inside the vocabulary, as in LLaVA; make_rows writes no such token


def llava_and_ours(language: str, layer: int, strategy: str) -> tuple[LlavaForConditionalGeneration, VLM]:
    keep_cls = strategy == "full"
    ours = make_vlm(
        language,
        "clip",
        image_token_id=IMAGE_ID,
        connector={"name": "mlp", "depth": 2, "hidden_dim": 32},
        vision_layer=layer,
        keep_cls=keep_cls,
        num_image_tokens=NUM_PATCHES + keep_cls,
    )
    config = LlavaConfig(
        vision_config=ours.config.vision_config.to_dict(),
        text_config=ours.config.text_config.to_dict(),
        image_token_index=IMAGE_ID,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    state = {f"model.vision_tower.{name}": value for name, value in ours.vision.state_dict().items()}
    for name, value in ours.language.state_dict().items():
        state[name.replace("model.", "model.language_model.", 1)] = value
    for name, value in ours.connector.state_dict().items():
        state[name.replace("layers.0", "linear_1").replace("layers.3", "linear_2")] = value
    state = {f"model.multi_modal_projector.{k}" if k.startswith("linear") else k: v for k, v in state.items()}
    llava.load_state_dict(state, strict=True)
    return llava, ours


def batch_for(model: VLM, side: str) -> dict[str, Tensor]:
    rows = make_rows()
    for row in rows:
        run = [IMAGE_ID] * model.config.num_image_tokens
        text = [-1 if token == VOCAB else token for token in row.ids]
        while -1 in text:
            start = text.index(-1)
            text[start : start + NUM_PATCHES] = run
        row.ids = text
    return collate(rows, side)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("language", ["llama", "gemma3"])
def test_logits_and_greedy_text_are_those_of_llava(language: str, layer: int, strategy: str) -> None:
    llava, ours = llava_and_ours(language, layer, strategy)
    batch = batch_for(ours, "left")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = llava(**batch, position_ids=positions).logits
        actual = ours(**batch).logits
    real = batch["attention_mask"].bool()
    close(actual[real], expected[real])
    assert float(expected[real].std()) > 0.1  # the comparison is not one of zeros
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "suppress_tokens": [IMAGE_ID],
    }
    answers = [
        model.generate(**batch, **options, use_cache=cached) for model in (llava, ours) for cached in (True, False)
    ]
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])
    assert len(set(answers[0][:, -12:].flatten().tolist())) > 3


def test_the_pictures_matter_to_the_comparison() -> None:
    _, ours = llava_and_ours("llama", -2, "default")
    batch = batch_for(ours, "right")
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    with torch.no_grad():
        assert not torch.allclose(ours(**batch).logits, ours(**other).logits, atol=1e-2)


# --- encoders from folders -----------------------------------------------------------------------------------------


@pytest.fixture(params=[name for name in ENCODERS if name != "vit"])
def saved_encoder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, PreTrainedModel, Path]:
    """(name, the model with its pooler, folder)."""
    model = ENCODERS[request.param]()
    randomise(model)
    model.save_pretrained(tmp_path)
    return request.param, model.eval(), tmp_path


def pictures(num: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def quiet_load(folder: Path, caplog: pytest.LogCaptureFixture) -> PreTrainedModel:
    """load_vision, which must not report any freshly initialised or mismatched weight."""
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            model = load_vision(str(folder))
    finally:
        root.removeHandler(caplog.handler)
    report = caplog.text
    assert "MISSING" not in report and "MISMATCH" not in report and "newly initialized" not in report, report
    return model


def test_folder_features_and_token_counts(
    saved_encoder: tuple[str, PreTrainedModel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    name, model, folder = saved_encoder
    loaded = quiet_load(folder, caplog).eval()
    with torch.no_grad():
        expected = model(pictures(), output_hidden_states=True)
        actual = loaded(pictures(), output_hidden_states=True)
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert token_counts(loaded.config) == (NUM_PREFIX[name], NUM_PATCHES)
    assert actual.last_hidden_state.shape == (2, NUM_PREFIX[name] + NUM_PATCHES, 24)


def test_no_pooler_is_left(saved_encoder: tuple[str, PreTrainedModel, Path]) -> None:
    loaded = load_vision(str(saved_encoder[2]))
    names = [name for name, _ in loaded.named_parameters()]
    assert names and not [name for name in names if "pooler" in name or name.startswith("head")]


@pytest.mark.parametrize("keep_cls", [False, True])
@pytest.mark.parametrize("layer", [None, -1, -2, 0])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_layer_choice_and_cls(name: str, layer: int | None, keep_cls: bool) -> None:
    model = make_vlm("llama", name, vision_layer=layer, keep_cls=keep_cls)
    with torch.no_grad():
        outputs = model.vision(pictures(), output_hidden_states=True)
        features = model.encode_images(pictures())
    chosen = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
    prefix = NUM_PREFIX[name]
    assert features.shape == (2, NUM_PATCHES + prefix * keep_cls, 24)
    assert torch.equal(features, chosen if keep_cls else chosen[:, prefix:])


def test_seed_b_keeps_cls_at_full_resolution() -> None:
    """ViT at 224 pixels in patches of 16: 196 patches and CLS, 197 tokens."""
    assert token_counts(ViTConfig(image_size=224, patch_size=16)) == (1, 196)


TEXT_TOWER = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TWO_TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPModel(
        CLIPConfig(
            vision_config=vision_encoder("clip").config.to_dict(), text_config=dict(TEXT_TOWER), projection_dim=8
        )
    ),
    "siglip": lambda: SiglipModel(
        SiglipConfig(vision_config=vision_encoder("siglip").config.to_dict(), text_config=dict(TEXT_TOWER))
    ),
}


@pytest.mark.parametrize("name", list(TWO_TOWERS))
def test_two_towers_give_only_the_vision_tower(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    towers = TWO_TOWERS[name]()
    randomise(towers)
    towers.eval().save_pretrained(tmp_path)
    loaded = quiet_load(tmp_path, caplog).eval()
    assert isinstance(loaded.config, (CLIPVisionConfig, SiglipVisionConfig))
    with torch.no_grad():
        expected = towers.vision_model(pictures()).last_hidden_state
        assert torch.equal(loaded(pictures()).last_hidden_state, expected)
    assert not [n for n, _ in loaded.named_parameters() if "text" in n or "pooler" in n or n.startswith("head")]


def test_unreadable_encoders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_vision(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"vision encoder .*the folder cannot be read"):
        load_vision(str(tmp_path))
    vision_encoder("clip").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"vision encoder .*the folder cannot be read"):
        load_vision(str(tmp_path))


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_missing_tensor_is_an_error_and_not_random(part: str, tmp_path: Path) -> None:
    model = vision_encoder("clip") if part == "vision" else language_model("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 1 of"):
        load_vision(str(tmp_path)) if part == "vision" else load_language(str(tmp_path))


def test_an_image_classifier_without_pooler_loads(tmp_path: Path) -> None:
    """google/vit-large-patch16-224 (seed B) is such a folder: its pooler would be random, so it must be gone."""
    config = ViTConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                       patch_size=8)  # fmt: skip
    classifier = ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    loaded = load_vision(str(tmp_path)).eval()
    with torch.no_grad():
        expected = classifier.vit(pictures()).last_hidden_state
        assert torch.equal(loaded(pictures()).last_hidden_state, expected)
