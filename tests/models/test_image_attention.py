"""image_attention=bidirectional: the tokens of one picture see each other, and everything else stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
)

from eyespot.branching import greedy
from eyespot.compose import build, load_parts, save
from eyespot.data.packing import fill_rows, pack, share_prefixes
from eyespot.models.attention import block_mask, structure_mask, tokens_ahead
from eyespot.models.merge import placeholder_mask
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.processor import IGNORE_INDEX, Encoded
from tiny import (
    LANGUAGES,
    NUM_PATCHES,
    PICTURE,
    SLIDING,
    TEXT,
    VOCAB,
    WIDTH,
    close,
    collate,
    make_row,
    make_rows,
    make_vlm,
    randomise,
    vision_encoder,
)

LAYOUTS = ("tittttt", "tittt", "titt", "ttttttttt", "titttitt", "ttiitttttt")  # the first three share a picture
NEW = 8
VIT = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1,
                               "num_attention_heads": 2}}  # fmt: skip
GPT = {"name": "gpt", "args": {"max_position_embeddings": 96, "hidden_size": 32, "num_hidden_layers": 1,
                               "num_attention_heads": 2}}  # fmt: skip


@pytest.fixture(scope="module", params=list(LANGUAGES))
def model(request: pytest.FixtureRequest) -> VLM:
    return make_vlm(request.param, image_attention="bidirectional")


def samples() -> list[tuple[Encoded, list[Tensor], Hashable]]:
    rows = [make_row(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    for row in rows[1:3]:
        row.pixels, row.ids[0] = rows[0].pixels, rows[0].ids[0]
    keys = [0, 0, 0, 1, 2, 3]
    return [
        (Encoded(row.ids, [IGNORE_INDEX] * (len(row.ids) - 2) + row.ids[-2:], len(row.pixels)), list(row.pixels), key)
        for row, key in zip(rows, keys, strict=True)
    ]


def naive_mask(ids: list[int], window: int | None) -> Tensor:
    """bool [T, T] by a loop over pairs, pictures told apart by counting placeholders."""
    seen, picture = 0, []
    for token in ids:
        picture.append(seen // NUM_PATCHES if token == VOCAB else None)
        seen += token == VOCAB
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for query in range(len(ids)):
        for key in range(len(ids)):
            together = picture[query] is not None and picture[query] == picture[key]
            near = window is None or query - key < window
            mask[query, key] = (key <= query or together) and near
    return mask


def naive_hidden(model: VLM, ids: list[int], pixels: Tensor) -> Tensor:
    """Last hidden states [T, D] of one row, with a ready mask in place of everything that is tested here."""
    config = model.language.config.get_text_config()
    embeds = model.embed(torch.tensor([ids]), model.embed_images(pixels) if len(pixels) else None)

    def ready(window: int | None) -> Tensor:
        seen = naive_mask(ids, window)[None, None]
        if config._attn_implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or [])
    mask: Any = ready(None)
    if "sliding_attention" in types:
        mask = {"full_attention": ready(None), "sliding_attention": ready(window)}
    positions = torch.arange(len(ids)).unsqueeze(0)
    hidden: Tensor = model.language.base_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state[0]
    return hidden


@torch.no_grad()
def alone(model: VLM, encoded: Encoded, images: list[Tensor]) -> Any:
    pixels = torch.stack(images) if images else None
    return model(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels, skip_logits=False)


# --- one row -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_are_those_of_a_mask_made_by_a_loop(model: VLM) -> None:
    """Windows shorter than a picture and its neighbours included."""
    for encoded, images, _ in samples():
        pixels = torch.stack(images) if images else torch.zeros(0)
        close(alone(model, encoded, images).last_hidden_state[0], naive_hidden(model, encoded.input_ids, pixels))


@torch.no_grad()
def test_only_tokens_of_one_picture_look_ahead(model: VLM) -> None:
    """What an earlier token computes may depend on a later one in the same picture, and nowhere else."""
    row = make_row("titiitt", 4)
    embeds = model.embed(torch.tensor([row.ids]), model.embed_images(row.pixels))
    kinds = placeholder_mask(torch.tensor([row.ids]), VOCAB).long()
    before = model(inputs_embeds=embeds, mm_token_type_ids=kinds, use_cache=False).last_hidden_state[0]
    expected = naive_mask(row.ids, None)
    for place in range(len(row.ids)):
        changed = embeds.clone()
        changed[0, place] += 1.0
        after = model(inputs_embeds=changed, mm_token_type_ids=kinds, use_cache=False).last_hidden_state[0]
        for earlier in range(place):
            moved = not torch.equal(before[earlier], after[earlier])
            assert moved == bool(expected[earlier, place]), (earlier, place)


@torch.no_grad()
def test_causal_is_the_default_and_unchanged(model: VLM) -> None:
    causal = copy.deepcopy(model)
    causal.config.image_attention = VLMConfig().image_attention
    assert causal.config.image_attention == "causal"
    for encoded, images, _ in samples():
        pictures = causal.embed_images(torch.stack(images)) if images else None
        embeds = causal.embed(torch.tensor([encoded.input_ids]), pictures)
        plain = causal.language.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        ours = alone(causal, encoded, images).last_hidden_state
        assert torch.equal(ours, plain)
        other = alone(model, encoded, images).last_hidden_state
        assert torch.equal(other, plain) == (not images)  # a row of words is the language model's, bit for bit
        before_pictures = encoded.input_ids.index(VOCAB) if images else 0
        close(other[:, :before_pictures], plain[:, :before_pictures])
        assert not images or float((other - plain).abs().max()) > 1e-3


# --- several rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_are_those_alone(model: VLM, side: str) -> None:
    rows = make_rows()
    batch = collate(rows, side)
    found = model(**batch).logits
    for place, row in enumerate(rows):
        wanted = model(**{"pixel_values": None, **collate([row])}).logits[0]
        close(found[place][batch["attention_mask"][place] == 1], wanted)


def packed(model: VLM, *, share: bool, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    given = samples() if share else [(e, images, i) for i, (e, images, _) in enumerate(samples())]
    batch, images = pack(fill_rows(share_prefixes(given, VOCAB, 48), 48), pad_id=0)
    return model(**batch, pixel_values=torch.stack(images), num_items_in_batch=1, **options), batch


@pytest.mark.parametrize("share", [False, True])
def test_packed_loss_and_gradients_are_the_sum_of_the_samples(model: VLM, share: bool) -> None:
    model.requires_grad_(True)
    total = torch.zeros(())
    for encoded, images, _ in samples():
        pixels = torch.stack(images) if images else None
        ids, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
        total = total + model(input_ids=ids, pixel_values=pixels, labels=labels, num_items_in_batch=1).loss
    total.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output, _ = packed(model, share=share)
    output.loss.backward()
    close(output.loss.detach(), total.detach())
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, parameter in model.named_parameters():
        if name in wanted:
            close(parameter.grad / scale, wanted[name] / scale)
    model.zero_grad()


def test_a_text_in_transformers_packing_stays_alone() -> None:
    """Without mask and cache, positions that start again begin another text."""
    model = make_vlm("llama", image_attention="bidirectional")
    rows = [make_row("titt", 1), make_row("ttit", 2)]
    ids = torch.tensor([rows[0].ids + rows[1].ids])
    positions = torch.cat([torch.arange(len(row.ids)) for row in rows]).unsqueeze(0)
    with torch.no_grad():
        found = model(
            input_ids=ids, pixel_values=torch.cat([row.pixels for row in rows]), position_ids=positions, use_cache=False
        ).last_hidden_state[0]
        wanted = [alone(model, Encoded(row.ids, row.ids, 1), list(row.pixels)).last_hidden_state[0] for row in rows]
    close(found, torch.cat(wanted))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_queries", [None, 12])
def test_flex_attention_gets_the_same_mask(window: int | None, num_queries: int | None) -> None:
    from torch.nn.attention.flex_attention import create_mask

    batch, _ = pack(fill_rows(share_prefixes(samples(), VOCAB, 48), 48), pad_id=0)
    structure = [batch[name] for name in ("documents", "branches", "position_ids")]
    ahead = tokens_ahead(batch["input_ids"] == VOCAB, NUM_PATCHES)[:, -(num_queries or 0) :]
    length = batch["documents"].shape[1]
    for keys in (None, range(length + 5), range(4, length)):
        wanted = structure_mask(*structure, window, num_queries, ahead, keys)
        flex = block_mask(*structure, window, num_queries, ahead, keys)
        assert tuple(flex.shape) == wanted.shape
        assert torch.equal(create_mask(flex.mask_mod, len(wanted), 1, *wanted.shape[2:], device="cpu"), wanted)
        if keys is not None:
            whole = structure_mask(*structure, window, num_queries, ahead)
            inside = range(keys.start, min(keys.stop, length))
            assert torch.equal(wanted[..., : len(inside)], whole[..., inside.start : inside.stop])
            assert not wanted[..., len(inside) :].any()


def test_eager_attention_gives_the_same_hidden_states() -> None:
    model = make_vlm("gemma3", image_attention="bidirectional")
    batch = collate(make_rows(), "left")
    real = batch["attention_mask"] == 1
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state[real]
        model.language.set_attn_implementation("eager")
        close(model(**batch).last_hidden_state[real], wanted)


# --- answers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_generation_with_every_cache_is_full_recomputation(model: VLM) -> None:
    batch = collate(make_rows(), "left")
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **options)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(NEW):
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert torch.equal(cached, ids)
    assert torch.equal(model.generate(**batch, cache_implementation="static", **options), ids)
    beams = model.generate(**batch, **options, num_beams=2)
    assert beams.shape == ids.shape
    assert len(ids[:, batch["input_ids"].shape[1] :].unique()) > 3


@torch.no_grad()
def test_a_picture_that_follows_a_cache(model: VLM) -> None:
    """A second turn with another picture, behind a cache that has dropped what its windows no longer see."""
    row = make_row("tittttttittt", 6)
    whole = alone(model, Encoded(row.ids, row.ids, 2), list(row.pixels)).last_hidden_state[:, 9:]
    first = {"input_ids": torch.tensor([row.ids[:9]]), "pixel_values": row.pixels[:1]}
    second = {"input_ids": torch.tensor([row.ids[9:]]), "pixel_values": row.pixels[1:]}
    cache = model(**first, use_cache=True).past_key_values
    close(model(**second, past_key_values=cache).last_hidden_state, whole)


@torch.no_grad()
def test_a_kept_prefix_changes_no_answer(model: VLM) -> None:
    row = make_row("titttittt", 3)
    ids = torch.tensor([row.ids])
    features = model.encode_images(row.pixels)
    length = len(row.ids) - 3
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(ids, image_features=features, **options)
    kept = model.prefill(ids[:, :length], features)
    assert torch.equal(model.generate(ids, inputs_embeds=model.embed_text(ids), past_key_values=kept, **options), whole)


def test_shared_prefix_answers_are_those_of_generate(model: VLM) -> None:
    answers = greedy(model, samples(), lambda images: model.encode_images(torch.stack(images)), NEW, [], 0)
    for (encoded, images, _), answer in zip(samples(), answers, strict=True):
        ids = torch.tensor([encoded.input_ids])
        pixels = torch.stack(images) if images else None
        sequence = model.generate(ids, pixel_values=pixels, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert sequence[0, ids.shape[1] :].tolist() == answer
    assert len({tuple(answer) for answer in answers}) > 3


# --- transformers ------------------------------------------------------------------------------------------------


def theirs(model: PreTrainedModel) -> PreTrainedModel:
    randomise(model, 7)
    return model.eval()


def ours_around(language: PreTrainedModel) -> VLM:
    encoder = vision_encoder("vit")
    config = VLMConfig(
        vision_config=encoder.config,
        text_config=language.config,
        image_token_id=VOCAB,
        num_image_tokens=NUM_PATCHES,
        image_attention="bidirectional",
    )
    return VLM(config, vision=encoder, language=language).eval()


@pytest.mark.parametrize("sliding_window", [3, 6])
@torch.no_grad()
def test_gemma_3_of_transformers(sliding_window: int) -> None:
    """Its text model under its own mask, two pictures with words between them and a row without any."""
    text = {**TEXT, **SLIDING, "sliding_window": sliding_window, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {**PICTURE, "model_type": "siglip_vision_model"}
    gemma = theirs(Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)))
    language = make_vlm("gemma3").language
    language.config.sliding_window = sliding_window
    language.model.load_state_dict(gemma.model.language_model.state_dict())
    for layer in language.model.layers:
        layer.self_attn.sliding_window = sliding_window if layer.self_attn.is_sliding else None
    ours = ours_around(language)
    batch = collate(make_rows(), "right")
    kinds = placeholder_mask(batch["input_ids"], VOCAB).long()
    embeds = ours.embed(batch["input_ids"], ours.embed_images(batch["pixel_values"]))
    wanted = gemma.model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], token_type_ids=kinds
    ).last_hidden_state
    found = ours(**batch).last_hidden_state
    real = batch["attention_mask"] == 1
    close(found[real], wanted[real])


@torch.no_grad()
def test_paligemma_of_transformers() -> None:
    """Its prefix is the picture alone here: what follows it counts as suffix."""
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    vision = {**PICTURE, "model_type": "siglip_vision_model"}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB, projection_dim=WIDTH)
    pali = theirs(PaliGemmaForConditionalGeneration(config))
    language = GemmaForCausalLM(GemmaConfig(**TEXT, head_dim=8)).eval()
    language.model.load_state_dict(pali.model.language_model.state_dict())
    ours = ours_around(language)
    row = make_row("itttttt", 5)
    ids = torch.tensor([row.ids])
    embeds = ours.embed(ids, ours.embed_images(row.pixels))
    kinds = (ids != VOCAB).long()
    wanted = pali.model(inputs_embeds=embeds, token_type_ids=kinds, use_cache=False).last_hidden_state
    close(ours(input_ids=ids, pixel_values=row.pixels).last_hidden_state, wanted)


# --- settings and errors -----------------------------------------------------------------------------------------


def test_the_option_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = build(VIT, {"name": "mlp"}, GPT, image_attention="bidirectional")
    assert model.config.image_attention == "bidirectional"
    save(model.eval(), processor, tmp_path)
    loaded, _ = load_parts(tmp_path)
    assert loaded.config.image_attention == "bidirectional"
    ids = torch.tensor([[5, *[model.config.image_token_id] * NUM_PATCHES, 6, 7]])
    pixels = make_row("i", 0).pixels
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(loaded(input_ids=ids, pixel_values=pixels).logits, wanted)
        model.config.image_attention = "causal"
        assert not torch.allclose(model(input_ids=ids, pixel_values=pixels).logits, wanted, atol=1e-4)


def test_unknown_values_are_refused() -> None:
    with pytest.raises(ValueError, match="image_attention is 'prefix'; choose causal or bidirectional"):
        VLMConfig(image_attention="prefix")
    with pytest.raises(ValueError, match=r"model\.image_attention is 'both'"):
        build(VIT, {"name": "mlp"}, GPT, image_attention="both")


def test_kernels_without_ready_masks_are_refused() -> None:
    language = make_vlm("llama").language
    language.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="image_attention=bidirectional needs attention kernel sdpa, eager"):
        ours_around(language)


SMALL = {"vocab_size": 300, "hidden_size": 32}
DEAF: dict[str, Any] = {
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**SMALL, num_hidden_layers=2)),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            **SMALL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DEAF))
def test_language_models_that_ignore_a_mask_are_refused(name: str, tmp_path: Path, llama_folder: Path) -> None:
    DEAF[name]().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path)
    parts = (VIT, {"name": "mlp"}, {"name": "pretrained", "args": {"source": str(tmp_path)}})
    with pytest.raises(ValueError, match=r"does not follow a mask .* set model\.image_attention=causal"):
        build(*parts, image_attention="bidirectional")


def test_embeddings_need_to_tell_where_pictures_are() -> None:
    model = make_vlm("llama", image_attention="bidirectional")
    with pytest.raises(ValueError, match="give mm_token_type_ids too, 1 on image tokens"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("ids", [[1, 9, 9, 9], [9, 9, 1, 2], [1, 9, 2, 9, 9, 9], [9, 9, 9, 9, 9, 1]])
def test_a_picture_is_never_cut(ids: list[int]) -> None:
    whole = torch.tensor([[9, 9, 9, 9, 1, 2]])
    assert tokens_ahead(whole == 9, 4).tolist() == [[3, 2, 1, 0, 0, 0]]
    with pytest.raises(ValueError, match="a picture's 4 tokens do not stand side by side"):
        tokens_ahead(torch.tensor([ids]) == 9, 4)
    with pytest.raises(ValueError, match="num_image_tokens is 0"):
        tokens_ahead(whole == 9, 0)


def test_a_cache_of_fixed_size_gets_a_mask_of_its_size() -> None:
    model = make_vlm("gemma3", image_attention="bidirectional")
    row = make_row("tittt", 1)
    text = model.config.text_config
    cache = StaticCache(config=text, max_cache_len=20)
    kinds = (torch.tensor([row.ids]) == VOCAB).long()
    masks = model.create_masks_for_generate(
        token_type_ids=kinds, config=model.config, attention_mask=None, position_ids=None, past_key_values=cache,
        inputs_embeds=torch.zeros(1, len(row.ids), 0),
    )  # fmt: skip
    assert masks["full_attention"].shape == (1, 1, len(row.ids), 20)
    assert torch.equal(masks["full_attention"][0, 0, :, : len(row.ids)], naive_mask(row.ids, None))
    assert torch.equal(masks["sliding_attention"][0, 0, :, : len(row.ids)], naive_mask(row.ids, text.sliding_window))
