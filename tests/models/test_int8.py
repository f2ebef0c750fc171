"""Eight-bit layers: the integer arithmetic is exact, the rounding is small, a model with them still answers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import eyespot
from eyespot.models.int8 import Int8Linear, quantize, to_int8
from eyespot.models.lora_linear import LoRALinear, folded, is_linear
from eyespot.models.vlm import VLM
from tiny import collate, make_rows, make_vlm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 5, 48), (1, 1, 48)])
def test_products_are_those_of_the_rounded_factors(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 33, bias=bias)
    layer = Int8Linear(plain.weight, plain.bias)
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x_int, x_scale = quantize(x)
    w_int, w_scale = quantize(plain.weight)
    wanted = (x_int.double() * x_scale) @ (w_int.double() * w_scale).t()
    if bias:
        wanted = wanted + plain.bias.double()
    torch.testing.assert_close(layer(x), wanted.float(), rtol=1e-5, atol=1e-6)
    error = (layer(x) - plain(x)).norm() / plain(x).norm()
    assert 0 < error < 0.02


def test_rows_of_zeros_stay_zeros() -> None:
    layer = Int8Linear(torch.randn(4, 8), None)
    assert torch.equal(layer(torch.zeros(3, 8)), torch.zeros(3, 4))
    assert torch.equal(Int8Linear(torch.zeros(4, 8), None)(torch.randn(3, 8)), torch.zeros(3, 4))


def test_logits_are_close_for_every_language_model(vlm: VLM) -> None:
    model = copy.deepcopy(vlm).eval()
    batch = collate(make_rows())
    with torch.no_grad():
        wanted = model(**batch).logits[..., :-1]
        num_linear = sum(is_linear(m) for part in (model.vision, model.language) for m in part.modules())
        assert to_int8(model) == num_linear > 0 or vlm.language.config.model_type == "gpt2"
        found = model(**batch).logits[..., :-1]
    assert not torch.equal(found, wanted)
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99
    assert not any(is_linear(m) for part in (model.vision, model.language) for m in part.modules())
    ids = model.generate(**collate(make_rows(), side="left"), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.shape[0] == 3


def test_adapters_are_folded_first() -> None:
    model = make_vlm("llama", lora={"language": {"r": 4, "alpha": 8, "dropout": 0.1, "targets": "all"}})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    merged = copy.deepcopy(model)
    with folded(merged):
        layer = next(m for m in merged.modules() if isinstance(m, LoRALinear))
        wanted = Int8Linear(layer.base_layer.weight, layer.base_layer.bias)
    to_int8(model)
    found = next(m for m in model.language.modules() if isinstance(m, Int8Linear))
    assert torch.equal(found.weight, wanted.weight) and torch.equal(found.scale, wanted.scale)


def test_special_adapters_and_other_devices_are_refused() -> None:
    model = make_vlm("llama", lora={"language": {"r": 4, "targets": "all"}})
    next(m for m in model.modules() if isinstance(m, LoRALinear))._disable_adapters = True
    with pytest.raises(ValueError, match="int8 needs plain adapters"):
        to_int8(model)
    with torch.device("meta"):
        elsewhere = VLM(make_vlm().config)
    with pytest.raises(ValueError, match="int8 is for CPUs, the model is on meta"):
        to_int8(elsewhere)


def test_a_folder_is_loaded_in_int8(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model, processor = eyespot.build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 96, **sizes}, "train": "lora",
         "lora": {"r": 2, "targets": "attention"}},
    )  # fmt: skip
    eyespot.save(model, processor, tmp_path / "model")
    plain = eyespot.load(tmp_path / "model", dtype="float32")
    adapted = [m for m in plain.model.modules() if isinstance(m, LoRALinear)]
    assert adapted and all(m.plain_adapter() == "default" for m in adapted), "a loaded model takes the quick ways, too"
    assistant = eyespot.load(tmp_path / "model", dtype="int8")
    assert sum(isinstance(m, Int8Linear) for m in assistant.model.modules()) > 10
    with pytest.raises(ValueError, match="a model in int8 is for answering and cannot be saved"):
        eyespot.save(assistant.model, processor, tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()
    picture = Image.new("RGB", (20, 20), "red")
    with assistant.folded():
        answers = assistant.ask(picture, ["hm?", "what is it?"], max_new_tokens=4)
    assert answers == [assistant.ask(picture, question, max_new_tokens=4) for question in ("hm?", "what is it?")]
