"""What trains and what does not: adapters, frozen parts, and the errors of both."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from eyespot.models.lora import add_lora, linear_layers
from eyespot.models.lora_linear import AdaptedLinear, LoRALinear, folded, fuse
from eyespot.models.vlm import VLM
from tiny import LANGUAGES, close, collate, language_model, make_rows, make_vlm, training_batch, vision_encoder

LORA = {"r": 4, "alpha": 8, "targets": "all"}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "connector only": ({}, {"vision": "frozen", "connector": "full", "language": "frozen"}),
    "language": ({}, {"vision": "frozen", "connector": "full", "language": "full"}),
    "encoder": ({}, {"vision": "full", "connector": "frozen", "language": "frozen"}),
    "everything": ({}, {"vision": "full", "connector": "full", "language": "full"}),
    "adapters": ({"language": LORA}, {"vision": "frozen", "connector": "full", "language": "lora"}),
    "adapters alone": ({"language": LORA}, {"vision": "frozen", "connector": "frozen", "language": "lora"}),
    "adapters in both": (
        {"language": LORA, "vision": LORA | {"targets": "attention"}},
        {"vision": "lora", "connector": "full", "language": "lora"},
    ),
    "an adapter that waits": ({"language": LORA}, {"vision": "frozen", "connector": "full", "language": "frozen"}),
}


def wake(model: VLM) -> None:
    """Adapters start with B = 0, where A has no gradient; move B away from zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def step(model: VLM) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    model.train()
    model(**training_batch()).loss.backward()
    optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("language", ["gpt", "llama", "gemma3"])
@pytest.mark.parametrize("name", list(MODES))
def test_one_step_moves_what_trains_and_nothing_else(name: str, language: str) -> None:
    lora, modes = MODES[name]
    model = make_vlm(language, lora=lora)
    wake(model)
    model.set_trainable(**modes)
    before = snapshot(model)
    step(model)
    after = model.state_dict()
    for key, parameter in model.named_parameters():
        same = torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8))
        # the keys' bias adds the same number to every score of a query, so softmax does not see it
        blind = key.endswith("k_proj.bias")
        assert same is not parameter.requires_grad or blind, key
        assert parameter.requires_grad is expected(modes[key.partition(".")[0]], key), key
    for key, value in model.named_buffers():
        assert key not in before or torch.equal(value, before[key]), key


def expected(mode: str, key: str) -> bool:
    return mode == "full" or (mode == "lora" and "lora_" in key)


def test_frozen_parts_get_no_gradient() -> None:
    model = make_vlm("llama")
    model.set_trainable(vision="frozen", connector="full", language="frozen")
    model(**training_batch()).loss.backward()
    with_gradient = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"connector"}


def test_no_graph_is_kept_of_a_frozen_encoder() -> None:
    model = make_vlm("llama")
    pixels = training_batch()["pixel_values"]
    assert model.encode_images(pixels).requires_grad
    model.set_trainable(vision="frozen")
    assert not model.encode_images(pixels).requires_grad
    assert model.embed_images(pixels).requires_grad


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", list(LANGUAGES))
def test_new_adapters_change_nothing(language: str) -> None:
    targets = "all-linear" if language == "gpt2" else "attention"
    plain, adapted = make_vlm(language), make_vlm(language, lora={"language": LORA | {"targets": targets}})
    with torch.no_grad():
        batch = collate(make_rows())
        assert torch.equal(adapted(**batch).logits, plain(**batch).logits)
        wake(adapted)
        assert not torch.allclose(adapted(**batch).logits, plain(**batch).logits, atol=1e-2)


def test_an_adapter_is_alpha_over_r_times_b_times_a() -> None:
    """arXiv 2106.09685, section 4.1: W x + (alpha / r) B A x."""
    model = language_model("llama")
    add_lora(model, {"r": 4, "alpha": 12, "targets": ["q_proj"]})
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(3, 32)
    delta = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    close(layer(x), x @ layer.base_layer.weight.T + 3.0 * delta)


def test_adapters_are_float32_also_in_a_bfloat16_model() -> None:
    model = language_model("llama").to(torch.bfloat16)
    add_lora(model, LORA)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["v_proj"], {"v_proj"}),
    ],
)
def test_targets(targets: Any, found: set[str]) -> None:
    model = language_model("llama")
    add_lora(model, {"r": 2, "targets": targets})
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == found


def test_all_linear_knows_gpt2_and_leaves_the_head() -> None:
    assert linear_layers(language_model("gpt2")) == ["c_attn", "c_fc", "c_proj"]
    assert "lm_head" not in linear_layers(language_model("gpt"))
    assert linear_layers(vision_encoder("clip")) == ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 4}, "unknown LoRA setting 'rank'; settings: r, alpha, dropout, targets, bias"),
        ({"targets": "attn"}, "lora.targets is 'attn'; choose attention, all, all-linear or a list of layer names"),
        ({"targets": ["qkv"]}, "no layer of LlamaForCausalLM is named qkv; set lora.targets to some of: down_proj, "),
        ({"targets": ["q_proj", "qkv"]}, "no layer of LlamaForCausalLM is named qkv"),
        ({"r": 0}, "`r` should be a positive integer"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    model = language_model("llama")
    with pytest.raises(ValueError, match=re.escape(words)):
        add_lora(model, settings)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]


def test_a_group_without_any_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layer of GPT2LMHeadModel is named q_proj"):
        add_lora(language_model("gpt2"), {"targets": "attention"})


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_train_as_set(bias: str) -> None:
    model = make_vlm("gpt", lora={"language": {"r": 2, "targets": ["q_proj", "v_proj"], "bias": bias}})
    model.set_trainable(vision="frozen", connector="frozen", language="lora")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    biases = {name for name, _ in model.language.named_parameters(prefix="language") if name.endswith("bias")}
    of_adapted = {name for name in biases if "q_proj" in name or "v_proj" in name}
    assert len(of_adapted) == 4 < len(biases)
    assert trainable == {"none": set(), "lora_only": of_adapted, "all": biases}[bias]


# --- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "words"),
    [
        ({"visoin": "full"}, "visoin='full' is not a part and a mode"),
        ({"vision": "half"}, "vision='half' is not a part and a mode"),
        ({"vision": True}, "vision=True is not a part and a mode"),
        ({"language": "lora"}, "language has no adapter; compose the model with language.lora set"),
        ({"connector": "lora"}, "connector has no adapter"),
    ],
)
def test_wrong_modes(modes: dict[str, Any], words: str) -> None:
    model = make_vlm("llama", lora={"vision": LORA | {"targets": "attention"}})
    with pytest.raises(ValueError, match=re.escape(words)):
        model.set_trainable(**modes)


def test_parts_that_are_not_named_stay_as_they_are() -> None:
    model = make_vlm("llama")
    model.set_trainable(vision="frozen")
    model.set_trainable(connector="frozen")
    assert not any(p.requires_grad for p in (*model.vision.parameters(), *model.connector.parameters()))
    assert all(p.requires_grad for p in model.language.parameters())


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model = make_vlm("gpt", connector={"name": "mlp", "dropout": 0.5})
    model.set_trainable(vision="frozen", connector="full", language="frozen")
    model.train()
    assert model.training and model.connector.training
    assert not any(module.training for module in (*model.vision.modules(), *model.language.modules()))
    model.set_trainable(vision="full")
    model.train()
    assert all(module.training for module in model.vision.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_frozen_encoder_with_dropout_gives_the_same_features_while_training() -> None:
    model = make_vlm("llama", "hf_vit")
    for module in model.vision.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.set_trainable(vision="frozen")
    pixels = training_batch()["pixel_values"]
    expected_features = model.eval().encode_images(pixels)
    assert torch.equal(model.train().encode_images(pixels), expected_features)


def adapted_layer(bias: bool, dtype: torch.dtype = torch.float32) -> Linear:
    """peft's layer with an adapter that does something, on random weights."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(12, 20, bias=bias).to(dtype))
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["0"]), holder)
    layer = holder[0]
    assert isinstance(layer, Linear)
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        part.weight.data = torch.randn(part.weight.shape)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_adapter_computes_what_peft_computes(bias: bool, dtype: torch.dtype) -> None:
    plain, fused = adapted_layer(bias, dtype), adapted_layer(bias, dtype)
    assert fuse(nn.Sequential(fused)) == 1 and type(fused) is LoRALinear
    x = torch.randn(2, 5, 12)
    results = []
    for layer in (plain, fused):
        own = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(own)
        y.float().pow(2).sum().backward()
        grads = [own.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
        assert all(g is not None for g in grads) and all(
            p.grad is None for p in layer.base_layer.parameters() if not p.requires_grad
        )
        results.append([y, *grads])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        size = a.float().abs().max()
        close(b.float() / size, a.float() / size, 1e-5 if dtype == torch.float32 else 2e-2)


def test_the_fused_adapter_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 6), (5, 6), (5,), (2, 6), (5, 2))]
    leaves = [v.requires_grad_(i != 1) for i, v in enumerate(values)]

    def function(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Any:
        return AdaptedLinear.apply(x, leaves[1], bias, a, b, 0.7)

    x, weight, bias, a, b = leaves
    close(function(x, bias, a, b), x @ weight.t() + bias + 0.7 * x @ a.t() @ b.t(), 1e-12)
    y = function(x, bias, a, b)
    wanted = torch.autograd.grad((x @ weight.t() + bias + 0.7 * x @ a.t() @ b.t()).pow(2).sum(), [x, bias, a, b])
    for found, right in zip(torch.autograd.grad(y.pow(2).sum(), [x, bias, a, b]), wanted, strict=True):
        close(found.double(), right, 1e-5)


@pytest.mark.parametrize("change", ["disabled", "merged", "dropout", "trained"])
def test_everything_but_the_plain_case_is_left_to_peft(change: str) -> None:
    plain, fused = adapted_layer(bias=False), adapted_layer(bias=False)
    fuse(nn.Sequential(fused))
    for layer in (plain, fused):
        if change == "disabled":
            layer.enable_adapters(False)
        if change == "merged":
            layer.merge()
        if change == "dropout":
            layer.lora_dropout["default"] = nn.Dropout(0.5)
        if change == "trained":
            layer.base_layer.weight.requires_grad_(True)
    x = torch.randn(3, 12)
    outputs = []
    for layer in (plain, fused):
        torch.manual_seed(1)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    if change == "trained":
        outputs[1].sum().backward()
        assert fused.base_layer.weight.grad is not None


def test_composed_models_use_the_fused_adapter() -> None:
    model = make_vlm("gemma3", lora={"language": LORA})
    assert sum(type(layer) is LoRALinear for layer in model.modules()) == 14
    copied = copy.deepcopy(model)
    batch = training_batch()
    close(copied(**batch).loss, model(**batch).loss)


def test_folded_adapters_answer_alike_and_leave_no_trace() -> None:
    model = make_vlm("gemma3", lora={"language": LORA}).eval()
    wake(model)
    batch = training_batch()
    before, wanted = snapshot(model), model(**batch, skip_logits=False).logits
    with folded(model):
        assert not torch.equal(model.state_dict()["language.model.layers.0.self_attn.q_proj.base_layer.weight"],
                               before["language.model.layers.0.self_attn.q_proj.base_layer.weight"])  # fmt: skip
        close(model(**batch, skip_logits=False).logits, wanted, 1e-4)
    after = snapshot(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model(**batch, skip_logits=False).logits, wanted)
