"""The Q-Former against BLIP-2 and BERT of transformers, and who sees whom in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from eyespot.compose import build, load_parts, save
from eyespot.models.connectors.qformer import QFormerConnector, visibility
from eyespot.models.vlm import VLM
from tiny import close, collate, make_rows, make_vlm, randomise

VISION_DIM = 12
LANGUAGE_DIM = 6
WORDS = 40
QUERIES = 4
HIDDEN = 16
SIZES: dict[str, Any] = {"num_queries": QUERIES, "hidden_dim": HIDDEN, "depth": 3, "heads": 2, "mlp_dim": 20}
TEXT: dict[str, Any] = {**SIZES, "text_vocab_size": WORDS, "max_text": 10}
THEIRS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": WORDS,
    "max_position_embeddings": 10,
}


def qformer(seed: int = 0, **changes: Any) -> QFormerConnector:
    connector = QFormerConnector(VISION_DIM, LANGUAGE_DIM, **{**TEXT, **changes})
    randomise(connector, seed)
    return connector.eval()


def features(num: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(num, 7, VISION_DIM, generator=torch.Generator().manual_seed(seed))


def texts() -> tuple[Tensor, Tensor]:
    """Three texts of 8, 5 and 1 tokens, padded on the right: ids and mask int64 [3, 8]."""
    ids = torch.randint(1, WORDS, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(8) < torch.tensor([[8], [5], [1]])
    return ids * mask, mask.long()


# --- BLIP-2 --------------------------------------------------------------------------------------------------------

BLIP2_NAMES = (
    (r"qformer\.layernorm", "norm"),
    (r"qformer\.encoder\.layer", "layers"),
    (r"crossattention", "cross_attention"),
    (r"attention\.attention\.(query|key|value)", r"attention.\1"),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"attention\.output\.LayerNorm", "attention.norm"),
    (r"intermediate_query\.dense", "query_mlp.up_proj"),
    (r"output_query\.dense", "query_mlp.down_proj"),
    (r"output_query\.LayerNorm", "query_mlp.norm"),
    (r"(\d)\.intermediate\.dense", r"\1.text_mlp.up_proj"),
    (r"(\d)\.output\.dense", r"\1.text_mlp.down_proj"),
    (r"(\d)\.output\.LayerNorm", r"\1.text_mlp.norm"),
    (r"embeddings\.(word|position)_embeddings", r"text.\1_embedding"),
)


def from_blip2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(("qformer.", "embeddings.")):
            for old, new in BLIP2_NAMES:
                key = re.sub(old, new, key)
            found[key] = value
    return {**found, "queries": state["query_tokens"][0]}


@pytest.mark.parametrize(("depth", "cross_every"), [(3, 2), (4, 3), (2, 1)])
def test_queries_equal_blip2(depth: int, cross_every: int) -> None:
    changes = {"num_hidden_layers": depth, "cross_attention_frequency": cross_every, "encoder_hidden_size": VISION_DIM}
    reference = Blip2QFormerModel(Blip2QFormerConfig(**{**THEIRS, **changes}))
    randomise(reference, 4)
    reference.eval()
    connector = qformer(depth=depth, cross_every=cross_every, text_vocab_size=None)
    state = {f"qformer.{key}": value for key, value in reference.state_dict().items()}
    query_tokens = torch.randn(1, QUERIES, HIDDEN)
    missing, unexpected = connector.load_state_dict(from_blip2({**state, "query_tokens": query_tokens}), strict=False)
    assert missing == ["proj.weight", "proj.bias"] and not unexpected
    with torch.no_grad():
        queries = query_tokens.expand(3, -1, -1)
        expected = reference(query_embeds=queries, encoder_hidden_states=features()).last_hidden_state
        assert float(expected.std()) > 0.1
        close(connector.query_states(features()), expected)
        close(connector(features()), connector.proj(expected))


@pytest.fixture
def retrieval() -> Blip2ForImageTextRetrieval:
    """All of BLIP-2's first stage: vision encoder, Q-Former with text."""
    vision = {
        "hidden_size": VISION_DIM, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=vision,
        qformer_config={**THEIRS, "use_qformer_text_input": True, "encoder_hidden_size": VISION_DIM},
        num_query_tokens=QUERIES,
        image_text_hidden_size=5,
    )
    model = Blip2ForImageTextRetrieval(config)
    randomise(model, 5)
    return model.eval()


def test_text_and_matching_equal_blip2(retrieval: Blip2ForImageTextRetrieval) -> None:
    connector = qformer()
    missing, unexpected = connector.load_state_dict(from_blip2(dict(retrieval.state_dict())), strict=False)
    assert all(key.startswith(("proj", "text.head")) for key in missing) and not unexpected
    ids, mask = texts()
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    real = mask.bool()
    with torch.no_grad():
        seen = retrieval.vision_model(pixels).last_hidden_state
        contrast = retrieval(pixels, ids, mask)
        text = connector.text_states(ids, mask)
        close(text[real], contrast.text_model_output.last_hidden_state[real])
        image = nn.functional.normalize(retrieval.vision_projection(connector.query_states(seen)), dim=-1)
        close(image, contrast.image_embeds)
        matching = retrieval(pixels, ids, mask, use_image_text_matching_head=True)
        queries, text = connector.joint_states(seen, ids, mask, causal=False)
        expected = matching.text_model_output.last_hidden_state
        close(queries, expected[:, :QUERIES])
        close(text[real], expected[:, QUERIES:][real])
        close(retrieval.itm_head(queries).mean(dim=1), matching.logits_per_image)


# --- BERT ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path: Path) -> BertForMaskedLM:
    """A tiny BERT with its head, saved in ``bert.name_or_path``."""
    model = BertForMaskedLM(BertConfig(**{**THEIRS, "max_position_embeddings": 14}))
    randomise(model, 6)
    folder = tmp_path / "bert"
    model.eval().save_pretrained(folder)
    return BertForMaskedLM.from_pretrained(folder).eval()


def started(source: str | None, **changes: Any) -> QFormerConnector:
    torch.manual_seed(0)
    return QFormerConnector(VISION_DIM, LANGUAGE_DIM, **{**TEXT, "source": source, **changes}).eval()


def test_a_started_text_side_is_bert(bert: BertForMaskedLM) -> None:
    connector = started(bert.name_or_path)
    ids, mask = texts()
    real = mask.bool()
    with torch.no_grad():
        expected = bert(ids, attention_mask=mask, output_hidden_states=True)
        states = connector.text_states(ids, mask)
        close(states[real], expected.hidden_states[-1][real])
        close(connector.text_logits(states)[real], expected.logits[real])
    assert float(expected.logits.detach().std()) > 0.1


def test_queries_start_from_bert_and_cross_attention_fresh(bert: BertForMaskedLM) -> None:
    with_text, without = started(bert.name_or_path), started(bert.name_or_path, text_vocab_size=None)
    fresh = started(None)
    for i, theirs in enumerate(bert.bert.encoder.layer):
        for connector in (with_text, without):
            layer = connector.layers[i]
            assert torch.equal(layer.query_mlp.up_proj.weight, theirs.intermediate.dense.weight)
            assert torch.equal(layer.query_mlp.norm.bias, theirs.output.LayerNorm.bias)
            assert torch.equal(layer.attention.k_proj.bias, theirs.attention.self.key.bias)
    for name, parameter in fresh.named_parameters():
        if "cross_attention" in name or name.startswith(("queries", "proj")):
            assert torch.equal(parameter, with_text.get_parameter(name)), name
        else:
            assert not torch.equal(parameter, with_text.get_parameter(name)), name
    assert with_text(features()).shape == without(features()).shape == (3, QUERIES, LANGUAGE_DIM)


def test_queries_and_text_do_not_share_feed_forwards_after_the_start(bert: BertForMaskedLM) -> None:
    layer = started(bert.name_or_path).layers[0]
    assert layer.query_mlp.up_proj.weight.data_ptr() != layer.text_mlp.up_proj.weight.data_ptr()


def test_the_head_of_a_bert_for_pretraining_is_read(bert: BertForMaskedLM, tmp_path: Path) -> None:
    whole = BertForPreTraining(bert.config)
    whole.load_state_dict(bert.state_dict(), strict=False)
    whole.save_pretrained(tmp_path / "whole")
    text = started(str(tmp_path / "whole")).text
    assert text is not None
    assert torch.equal(text.head_proj.weight, bert.cls.predictions.transform.dense.weight)
    assert torch.equal(text.head_bias, bert.cls.predictions.bias)


def test_a_bert_without_head_leaves_the_head_fresh(bert: BertForMaskedLM, tmp_path: Path) -> None:
    BertModel(bert.config, add_pooling_layer=False).save_pretrained(tmp_path / "plain")
    connector, fresh = started(str(tmp_path / "plain")), started(None)
    assert connector.text is not None and fresh.text is not None
    assert torch.equal(connector.text.head_proj.weight, fresh.text.head_proj.weight)
    assert not torch.equal(connector.text.word_embedding.weight, fresh.text.word_embedding.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_dim": 32}, "qformer hidden_dim is 32 but source"),
        ({"depth": 2}, "has 3; set depth=3"),
        ({"heads": 4}, "has 2; set heads=2"),
        ({"mlp_dim": None}, "has 20; set mlp_dim=20"),
        ({"text_vocab_size": 41}, "has 40; set text_vocab_size=40"),
        ({"max_text": 15}, "has 14; set max_text=14"),
    ],
)
def test_sizes_of_the_source_are_wanted(changes: dict[str, Any], words: str, bert: BertForMaskedLM) -> None:
    with pytest.raises(ValueError, match=words):
        started(bert.name_or_path, **changes)


def test_sources_that_are_no_whole_bert(bert: BertForMaskedLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a readable folder nor a Hub name"):
        started(str(tmp_path / "nothing"))
    RobertaForMaskedLM(RobertaConfig(**THEIRS)).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ValueError, match="is of type 'roberta' with activation 'gelu'; give a model of type 'bert'"):
        started(str(tmp_path / "roberta"))
    folder = Path(bert.name_or_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of .* 'bert.encoder.layer.1.output.dense.weight'"):
        started(bert.name_or_path)


def test_a_saved_model_needs_no_source(bert: BertForMaskedLM, tmp_path: Path) -> None:
    source = bert.name_or_path
    arguments = {**TEXT, "depth": 3, "source": source, "num_queries": 4}
    model, processor = build(
        vision={"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1,
                                        "num_attention_heads": 2}},
        connector={"name": "qformer", "args": arguments},
        language={"name": "gpt", "args": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}},
    )  # fmt: skip
    assert torch.equal(model.connector.norm.weight, bert.bert.embeddings.LayerNorm.weight)  # type: ignore[union-attr]
    randomise(model.connector, 7)  # trained since
    save(model, processor, tmp_path / "model")
    shutil.rmtree(source)
    loaded, _ = load_parts(tmp_path / "model")
    expected = dict(model.connector.named_parameters())
    found = dict(loaded.connector.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- who sees whom -------------------------------------------------------------------------------------------------


def changed(before: Tensor, after: Tensor) -> list[bool]:
    """For each place of [N, L, H] whether it differs in any row."""
    return ((before - after).abs().amax(dim=(0, 2)) > 1e-4).tolist()


def test_masks_as_the_paper_draws_them() -> None:
    mask = torch.tensor([[1, 1, 0]])
    rows = {
        (2, False): ["11110", "11110", "11110", "11110", "11111"],
        (2, True): ["11000", "11000", "11100", "11110", "11111"],
        (0, False): ["110", "110", "111"],
    }
    for (num_queries, causal), expected in rows.items():
        found = visibility(mask, num_queries, causal)
        assert found.shape == (1, 1, len(expected), len(expected)) and found.dtype == torch.bool
        assert ["".join(str(int(cell)) for cell in row) for row in found[0, 0]] == expected


def test_captioning_sees_the_picture_and_earlier_words_only() -> None:
    connector = qformer()
    ids, mask = texts()
    ids, mask = ids[:1], mask[:1]
    other = ids.clone()
    other[:, 5] = ids[:, 5] % (WORDS - 1) + 1
    with torch.no_grad():
        queries, text = connector.joint_states(features(1), ids, mask, causal=True)
        queries_after, text_after = connector.joint_states(features(1), other, mask, causal=True)
        _, text_elsewhere = connector.joint_states(features(1, seed=9), ids, mask, causal=True)
        alone = connector.query_states(features(1))
    assert changed(text, text_after) == [False] * 5 + [True] * 3
    assert torch.equal(queries, queries_after)
    close(queries, alone)
    assert changed(text, text_elsewhere) == [True] * 8


def test_captioning_gives_what_each_beginning_gives() -> None:
    connector = qformer()
    ids, mask = texts()
    with torch.no_grad():
        _, whole = connector.joint_states(features(), ids, mask, causal=True)
        for length in (1, 4):
            _, text = connector.joint_states(features(), ids[:, :length], mask[:, :length], causal=True)
            close(text[0], whole[0, :length])


def test_matching_sees_everything() -> None:
    connector = qformer()
    ids, mask = texts()
    ids, mask = ids[:1], mask[:1]
    other = ids.clone()
    other[:, 7] = ids[:, 7] % (WORDS - 1) + 1
    with torch.no_grad():
        queries, text = connector.joint_states(features(1), ids, mask, causal=False)
        queries_after, text_after = connector.joint_states(features(1), other, mask, causal=False)
        queries_elsewhere, text_elsewhere = connector.joint_states(features(1, seed=9), ids, mask, causal=False)
    assert changed(text, text_after) == [True] * 8 and changed(queries, queries_after) == [True] * QUERIES
    assert changed(text, text_elsewhere) == [True] * 8 and changed(queries, queries_elsewhere) == [True] * QUERIES


def states(connector: QFormerConnector, ids: Tensor, mask: Tensor) -> Iterable[Tensor]:
    """Every state float [N, L, H] of pictures and texts, padding moved to the right."""
    order = (1 - mask).argsort(dim=-1, stable=True).unsqueeze(-1).expand(-1, -1, HIDDEN)
    yield connector.text_states(ids, mask).gather(1, order)
    for causal in (False, True):
        queries, text = connector.joint_states(features(), ids, mask, causal=causal)
        yield queries
        yield text.gather(1, order)


def test_padding_on_either_side_changes_nothing() -> None:
    connector = qformer()
    ids, mask = texts()
    left = mask.argsort(dim=-1, stable=True)
    garbage = ids + (1 - mask) * 17
    wider = nn.functional.pad(ids, (0, 2)), nn.functional.pad(mask, (0, 2))
    with torch.no_grad():
        expected = list(states(connector, ids, mask))
        for other in ((garbage, mask), (ids.gather(1, left), mask.gather(1, left)), wider):
            for before, after in zip(expected, states(connector, *other), strict=True):
                real = mask.bool() if before.shape[1] == 8 else ...
                close(after[:, : before.shape[1]][real], before[real])


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_do_not_meet(causal: bool) -> None:
    connector = qformer()
    ids, mask = texts()
    with torch.no_grad():
        together = connector.joint_states(features(), ids, mask, causal=causal)
        for i in range(3):
            row = slice(i, i + 1)
            alone = connector.joint_states(features()[row], ids[row], mask[row], causal=causal)
            close(alone[0], together[0][row])
            close(alone[1], together[1][row])


def test_an_empty_text_gives_numbers() -> None:
    connector = qformer()
    ids = torch.zeros(2, 3, dtype=torch.long)
    text = connector.text_states(ids, torch.zeros_like(ids))
    text.sum().backward()
    assert text.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in connector.parameters())


# --- the parts -----------------------------------------------------------------------------------------------------


def reached(connector: QFormerConnector, loss: Tensor) -> set[str]:
    connector.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in connector.named_parameters() if p.grad is not None}


def test_the_text_side_is_what_pictures_do_not_use() -> None:
    connector = qformer()
    ids, mask = texts()
    everything = {name for name, _ in connector.named_parameters()}
    side = {id(p) for p in connector.text_side()}
    names = {name for name, p in connector.named_parameters() if id(p) in side}
    assert len(names) == len(connector.text_side()) and 0 < len(names) < len(everything)
    assert reached(connector, connector(features()).sum()) == everything - names
    logits = connector.text_logits(connector.joint_states(features(), ids, mask, causal=True)[1])
    assert logits.shape == (3, 8, WORDS)
    assert everything - reached(connector, logits.sum()) == {"proj.weight", "proj.bias"}


def test_without_text_there_is_no_text_side() -> None:
    connector = qformer(text_vocab_size=None)
    ids, mask = texts()
    assert connector.text_side() == []
    words = "this qformer has no text side; set text_vocab_size"
    with pytest.raises(ValueError, match=words):
        connector.text_states(ids, mask)
    with pytest.raises(ValueError, match=words):
        connector.joint_states(features(), ids, mask, causal=True)
    with pytest.raises(ValueError, match=words):
        connector.text_logits(torch.zeros(1, HIDDEN))


def test_texts_that_do_not_fit() -> None:
    connector = qformer()
    ids, mask = texts()
    with pytest.raises(ValueError, match="the text has 16 tokens but max_text is 10; cut it or raise max_text"):
        connector.text_states(ids.repeat(1, 2), mask.repeat(1, 2))
    with pytest.raises(ValueError, match="2 pictures meet 3 texts; repeat the features"):
        connector.joint_states(features(2), ids, mask, causal=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 3}, "qformer hidden_dim 16 is not a multiple of heads 3; change one of them"),
        ({"num_queries": 0}, "qformer num_queries is 0; at least 1"),
        ({"cross_every": 0}, "qformer cross_every is 0; at least 1"),
        ({"text_vocab_size": 0}, "qformer text_vocab_size is 0; at least 1"),
        ({"max_text": 0}, "qformer max_text is 0; at least 1"),
    ],
)
def test_impossible_sizes(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        qformer(**changes)


def test_dropout_acts_in_training_only() -> None:
    connector = qformer(dropout=0.5)
    ids, mask = texts()
    assert torch.equal(connector.text_states(ids, mask), connector.text_states(ids, mask))
    connector.train()
    assert not torch.equal(connector.text_states(ids, mask), connector.text_states(ids, mask))


def test_bfloat16() -> None:
    connector = qformer()
    ids, mask = texts()
    queries, text = connector.joint_states(features(), ids, mask, causal=True)
    logits = connector.text_logits(text)
    connector.to(torch.bfloat16)
    rounded = connector.joint_states(features().to(torch.bfloat16), ids, mask, causal=True)
    assert rounded[0].dtype == rounded[1].dtype == connector.text_logits(rounded[1]).dtype == torch.bfloat16
    close(rounded[0].float(), queries, 0.15)
    close(connector.text_logits(rounded[1]).float(), logits, 0.15)


def test_full_size_on_the_meta_device_has_as_many_parameters_as_blip2() -> None:
    with torch.device("meta"):
        connector = QFormerConnector(1408, 2560, text_vocab_size=30_522, max_text=512, source="never read here")
        reference = Blip2QFormerModel(Blip2QFormerConfig(use_qformer_text_input=True))
    assert all(p.is_meta for p in connector.parameters())
    own = sum(p.numel() for p in connector.parameters())
    embeddings, head, projection = (30_522 + 512) * 768, 768 * 768 + 3 * 768 + 30_522, 768 * 2560 + 2560
    theirs = sum(p.numel() for p in reference.parameters()) + 32 * 768 + embeddings + head + projection
    assert own == theirs
    assert sum(p.numel() for p in connector.text_side()) == embeddings + head + 12 * (8 * 768**2 + 7 * 768)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    connector = QFormerConnector(96, 64, hidden_dim=128, depth=2, heads=4, text_vocab_size=200)
    for name, parameter in connector.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_inside_a_vlm_with_its_text_side(tmp_path: Path) -> None:
    settings = {**TEXT, "name": "qformer", "num_queries": 4}
    model = make_vlm("llama", connector=settings)
    batch = collate(make_rows())
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = VLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
    ids, mask = texts()
    for vlm in (model, loaded):
        assert isinstance(vlm.connector, QFormerConnector) and vlm.connector.hidden_dim == HIDDEN
    assert torch.equal(loaded.connector.text_states(ids, mask), model.connector.text_states(ids, mask))  # type: ignore[operator]
