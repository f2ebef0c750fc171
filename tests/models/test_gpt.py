"""The causal language model against transformers' GPT-2, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from eyespot.models.language.gpt import EyespotGPTForCausalLM, EyespotGPTModel, build_gpt

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 60,
    "pad_token_id": 59,
}


def tiny(**changes: Any) -> EyespotGPTForCausalLM:
    torch.manual_seed(0)
    model = build_gpt(**{**TINY, **changes}).eval()
    for parameter in model.parameters():  # small initial weights would make all greedy answers alike
        parameter.data.normal_(std=0.3)
    return model


def ids(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 58, shape, generator=torch.Generator().manual_seed(seed))


NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.wpe": "model.embed_positions",
    "transformer.ln_f": "model.norm",
    "transformer.h.": "model.layers.",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.c_proj": "attention.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def from_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 keeps its matrices transposed, and query, key and value in one."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".h." in key and key.endswith("weight") and value.ndim == 2:
            value = value.T
        for old, new in NAMES.items():
            key = key.replace(old, new)
        if "attn.c_attn" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                found[key.replace("attn.c_attn", f"attention.{name}_proj")] = part
        else:
            found[key] = value
    return found


def gpt2_and_ours() -> tuple[GPT2LMHeadModel, EyespotGPTForCausalLM]:
    sizes = {key: TINY[key] for key in ("vocab_size", "eos_token_id", "pad_token_id")}
    config = GPT2Config(**sizes, n_positions=24, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager")
    reference, ours = GPT2LMHeadModel(config).eval(), tiny()
    for parameter in reference.parameters():
        parameter.data.normal_(std=0.3)
    ours.load_state_dict(from_gpt2(reference.state_dict()), strict=True)
    return reference, ours


def test_equals_gpt2_in_logits_hidden_states_loss_and_greedy_text() -> None:
    reference, ours = gpt2_and_ours()
    tokens = ids(2, 9)
    labels = tokens.masked_fill(torch.arange(9) < 4, -100)
    with torch.no_grad():
        expected = reference(tokens, labels=labels, output_hidden_states=True)
        found = ours(tokens, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    for mine, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    mask = torch.ones_like(tokens)
    greedy = [m.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False) for m in (reference, ours)]
    assert torch.equal(*greedy)


def test_eager_attention_equals_sdpa_and_shows_its_weights() -> None:
    model, tokens = tiny(), ids(2, 7)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        found = model(tokens, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(found.logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    assert [tuple(weights.shape) for weights in found.attentions] == [(2, 4, 7, 7)] * 2
    assert not found.attentions[0][1].triu(1).any()  # row 1 has no padding


def test_cache_equals_recomputation_and_teacher_forcing() -> None:
    model, prompt = tiny(), ids(3, 5)
    mask = torch.ones_like(prompt)
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))
    with torch.no_grad():
        forced = model(cached[:, :-1]).logits.argmax(dim=-1)
    assert torch.equal(forced[:, 4:], cached[:, 5:])


def test_cache_in_two_pieces_equals_one_piece() -> None:
    model, tokens = tiny(), ids(2, 9)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :4], use_cache=True)
        second = model(tokens[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-5, rtol=1e-5)


def test_left_padding_right_padding_and_none_agree() -> None:
    model, text = tiny(), ids(1, 6)
    pad = torch.full((1, 4), 59)
    zeros, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)
    with torch.no_grad():
        alone = model(text).logits
        left = model(torch.cat([pad, text], dim=1), attention_mask=torch.cat([zeros, ones], dim=1)).logits
        right = model(torch.cat([text, pad], dim=1), attention_mask=torch.cat([ones, zeros], dim=1)).logits
    torch.testing.assert_close(left[:, 4:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right[:, :6], alone, atol=1e-5, rtol=1e-5)
    assert left.isfinite().all() and right.isfinite().all()


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}])
def test_a_left_padded_batch_generates_what_each_row_generates_alone(mode: dict[str, Any]) -> None:
    model, lengths = tiny(), (3, 7, 5)
    rows = [ids(1, length, seed=length) for length in lengths]
    batch = torch.full((3, 7), 59)
    for index, row in enumerate(rows):
        batch[index, 7 - row.shape[1] :] = row
    settings = {"max_new_tokens": 8, "eos_token_id": None, **mode}
    if mode["do_sample"]:
        settings["top_k"] = 1  # sampling with one choice left must be greedy
    together = model.generate(batch, attention_mask=(batch != 59).long(), **settings)
    for index, row in enumerate(rows):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **settings)
        assert torch.equal(together[index, 7:], alone[0, row.shape[1] :])


def test_generation_from_embeddings_equals_generation_from_ids() -> None:
    model, prompt = tiny(), ids(2, 5)
    mask = torch.ones_like(prompt)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    embeds = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings), model.generate(prompt, **settings)[:, 5:])


def test_generation_stops_at_the_end_token() -> None:
    model, prompt = tiny(), ids(1, 4)
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    free = model.generate(prompt, max_new_tokens=6, eos_token_id=None, **settings)[0, 4:].tolist()
    stopped = model.generate(prompt, max_new_tokens=6, eos_token_id=free[2], **settings)[0, 4:].tolist()
    assert stopped == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_finished_mask_is_used_as_it_is(kind: str) -> None:
    model, tokens = tiny(), ids(1, 8)
    texts = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    seen = (texts[:, None] == texts[None]) & torch.ones(8, 8).tril().bool()
    mask = seen[None, None]
    if kind == "float":
        mask = torch.zeros(1, 1, 8, 8).masked_fill(~mask, torch.finfo(torch.float32).min)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with torch.no_grad():
        packed = model(tokens, attention_mask=mask, position_ids=position_ids).logits
        by_positions = model(tokens, position_ids=position_ids, use_cache=False).logits
        alone = torch.cat([model(tokens[:, :5]).logits, model(tokens[:, 5:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_positions, alone, atol=1e-5, rtol=1e-5)


def test_logits_to_keep() -> None:
    model, tokens = tiny(), ids(2, 6)
    with torch.no_grad():
        every = model(tokens).logits
        assert torch.equal(model(tokens, logits_to_keep=2).logits, every[:, -2:])
        torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([1, 4])).logits, every[:, [1, 4]])
    with pytest.raises(ValueError, match="leave out logits_to_keep"):
        model(tokens, labels=tokens, logits_to_keep=1)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_strictly_and_tied(tmp_path: Path, tied: bool) -> None:
    model, tokens = tiny(tie_word_embeddings=tied), ids(1, 5)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, EyespotGPTForCausalLM)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.generation_config.eos_token_id == 60
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, EyespotGPTModel)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_a_larger_vocabulary_keeps_the_old_logits() -> None:
    model, tokens = tiny(), ids(1, 5)
    before = model(tokens).logits
    model.resize_token_embeddings(64)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.vocab_size == 64
    torch.testing.assert_close(model(tokens).logits[..., :61], before)


def test_parameter_count_at_full_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build_gpt()
    width, inner, layers = 768, 3072, 12
    formula = (50257 + 512) * width + layers * (4 * width * width + 2 * width * inner + inner + 9 * width) + 2 * width
    assert model.num_parameters() == formula == 124_046_592  # 124,439,808 of GPT-2 less 512 positions
    assert f"{formula:,}" in (EyespotGPTModel.__doc__ or "")


def test_residual_branches_start_smaller() -> None:
    torch.manual_seed(0)
    layer = build_gpt(**{**TINY, "num_hidden_layers": 8}).model.layers[0]
    assert layer.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.attention.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)


def test_too_long_a_sequence_names_the_limit_and_the_cure() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"reaches position 25 .* max_position_embeddings 24; shorten"):
        model(ids(1, 25))
    cache = model(ids(1, 20), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="reaches position 25"):
        model(ids(1, 5), past_key_values=cache)
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[:, :6] = 0
    assert model(ids(1, 30), attention_mask=mask).logits.shape == (1, 30, 61)  # 24 real tokens fit


def test_wrong_inputs() -> None:
    model, tokens = tiny(), ids(1, 4)
    with pytest.raises(ValueError, match="give exactly one"):
        model()
    with pytest.raises(ValueError, match="give exactly one"):
        model(tokens, inputs_embeds=torch.zeros(1, 4, 32))
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 1 columns but 4 cached and 1 new tokens need 5"):
        model(tokens[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 1))
    with pytest.raises(ValueError, match="hidden_size 32 is not a multiple of num_attention_heads 5"):
        build_gpt(**{**TINY, "num_attention_heads": 5})
    with pytest.raises(ValueError, match="eos_token_id 61 is outside the vocabulary of 61"):
        build_gpt(**{**TINY, "eos_token_id": 61})


def test_gradient_checkpointing_changes_memory_not_gradients() -> None:
    tokens = ids(2, 6)
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        output = model(tokens, labels=tokens)
        assert output.past_key_values is None
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_older_name_of_checkpointing_works_too() -> None:
    model = tiny().train()
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this transformers knows the older name only")
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    assert model.is_activation_checkpointing


def test_dropout_acts_in_training_only() -> None:
    model, tokens = tiny(dropout=0.5), ids(1, 5)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_return_dict_and_num_items_in_batch() -> None:
    model, tokens = tiny(), ids(2, 6)
    assert isinstance(model(tokens, return_dict=False), tuple)
    mean = model(tokens, labels=tokens).loss
    summed = model(tokens, labels=tokens, num_items_in_batch=5).loss
    torch.testing.assert_close(summed, mean * (2 * 5) / 5)


def test_bfloat16_stays_close() -> None:
    model, tokens = tiny(), ids(1, 6)
    exact = model(tokens).logits
    rounded = model.to(torch.bfloat16)(tokens).logits
    assert rounded.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(rounded.float().flatten(), exact.flatten(), dim=0) > 0.99
