"""GGUF files in the real llama.cpp (package xllamacpp), and what is refused.

The models are tiny, and trained until each of ten pictures has an answer of its own: random ones choose between nearly
equal tokens.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eyespot.compose import set_generation_defaults
from eyespot.export import gguf as export
from eyespot.export import gguf_text, gguf_vision
from eyespot.export.gguf_prompts import fitting_prompts
from eyespot.export.parity import ExportError, check, reply
from eyespot.inference import Assistant, user_turn
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.images import EyespotImageProcessor
from eyespot.processing.processor import Processor
from eyespot.processing.prompt import TEMPLATES
from eyespot.processing.tokenizers import byte_tokenizer, char_tokenizer
from templates import CHATML, make_processor, make_tokenizer
from tiny import IMAGE_SIZE, LANGUAGES, NUM_PATCHES, NUM_PREFIX, make_vlm, randomise, vision_encoder

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

QUESTION = "what is the colour?"
ANSWERS = ["red", "green", "blue", "white", "black", "pink", "grey", "gold", "teal", "brown"]
PICTURES = [PIL.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), answer) for answer in ANSWERS]
# every frequency of a head of 8 is changed by it
SCALED = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LORA = {"language": {"r": 2, "alpha": 4.0, "targets": "all"}}


def gemma_tokenizer() -> PreTrainedTokenizerBase:
    """Pieces of text with bytes to fall back on and no space before a text, as Gemma's."""
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("r", "e"), ("re", "d"), ("▁", "▁")]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [*"abcdefghijklmnopqrstuvwxyz?", *(left + right for left, right in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(words[:4])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes and merges behind the expression that Qwen 2 cuts words with."""
    tokenizer = make_tokenizer("bpe", ("<|im_start|>", "<|im_end|>"))
    cut = pre_tokenizers.Split(Regex(gguf_text._QWEN), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, last])  # type: ignore[attr-defined]
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of tiny parts; ``tokens`` make its tokenizer."""

    language: str
    vision: str
    tokens: Callable[[], PreTrainedTokenizerBase]
    template: str
    add_bos: bool
    settings: dict[str, Any]
    rope: dict[str, Any] | None = None


CASES = {
    "llama": Case(
        "llama", "siglip", lambda: make_tokenizer("bpe", ("<|im_start|>", "<|im_end|>")), CHATML, False,
        {"connector": {"name": "mlp", "dropout": 0.1}, "image_scale": 0.5, "lora": LORA}, SCALED,
    ),
    "qwen2": Case(
        "qwen2", "siglip", qwen_tokenizer, CHATML, False, {"connector": {"name": "linear"}, "vision_layer": -2}
    ),
    "qwen3": Case("qwen3", "siglip", byte_tokenizer, TEMPLATES["plain"], True, {}),
    "gemma3": Case("gemma3", "siglip", gemma_tokenizer, TEMPLATES["raw"], True, {}),
    "marked words": Case(
        "llama", "siglip", lambda: make_tokenizer("bpe"), TEMPLATES["plain"], True, {"connector": {"name": "mlp"}}
    ),
    "tied and marked": Case("gemma3", "siglip", gemma_tokenizer, TEMPLATES["plain"], True, {}),
    "clip": Case(
        "llama", "clip", lambda: make_tokenizer("bpe", ("<|im_start|>", "<|im_end|>")), CHATML, False,
        {"vision_layer": -2},
    ),
}  # fmt: skip


def assistant_of(case: Case) -> Assistant:
    """The model of a case, untrained."""
    tokenizer, encoder = case.tokens(), vision_encoder(case.vision)
    text_config = LANGUAGES[case.language]().config
    text_config.vocab_size = len(tokenizer)
    if case.rope:
        text_config.rope_parameters = case.rope
    torch.manual_seed(1)
    language = AutoModelForCausalLM.from_config(text_config)
    randomise(language, 1)
    settings = {
        "connector": {"name": "mlp"},
        "image_token_id": len(tokenizer),
        "num_prefix_tokens": NUM_PREFIX[case.vision],
        "num_image_tokens": NUM_PATCHES,
        "tie_word_embeddings": bool(text_config.tie_word_embeddings),
    }
    config = VLMConfig(vision_config=encoder.config, text_config=text_config, **{**settings, **case.settings})
    model = VLM(config, vision=encoder, language=language)
    randomise(model.connector, 3)
    processor = Processor(
        EyespotImageProcessor(size=IMAGE_SIZE), tokenizer, case.template,
        image_token_id=len(tokenizer), num_image_tokens=NUM_PATCHES, add_bos=case.add_bos,
    )  # fmt: skip
    set_generation_defaults(model, processor)
    return Assistant(model, processor, "cpu")


def train(assistant: Assistant, num_steps: int = 150) -> None:
    """Until every picture has its answer, and every answer as a question without a picture has itself."""
    model, processor = assistant.model, assistant.processor
    asked = [user_turn([0], QUESTION)] * len(ANSWERS) + [user_turn([], answer) for answer in ANSWERS]
    rows = [
        processor.encode_conversation([*turn, {"role": "assistant", "content": answer}])
        for turn, answer in zip(asked, 2 * ANSWERS, strict=True)
    ]
    batch = processor.pad(rows, "right")
    batch["pixel_values"] = processor.pixel_values(PICTURES)
    model.requires_grad_(True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if loss.item() < 0.01:
            break
    model.eval().requires_grad_(False)
    assistant.forget()


_TRAINED: dict[str, Assistant] = {}


def trained(name: str) -> Assistant:
    """The model of a case that gives every picture its answer; tests read it and never change it."""
    if name not in _TRAINED:
        assistant = _TRAINED[name] = assistant_of(CASES[name])
        train(assistant)
        assert [reply(assistant, picture, QUESTION, 8).text for picture in PICTURES] == ANSWERS
    return _TRAINED[name]


# --- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name != "clip"])
def test_ten_pictures_have_the_same_answers_in_llama_cpp(name: str, tmp_path: Path) -> None:
    assistant = trained(name)
    parity = check(assistant, export.export_gguf_f32(assistant, tmp_path), "gguf", PICTURES, QUESTION, 8)
    assert [row.answer for row in parity.pictures] == ANSWERS


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_smaller_files_answer_the_same(dtype: Any, tmp_path: Path) -> None:
    assistant = trained("llama")
    consumer = export.export_gguf(assistant, tmp_path, dtype)
    parity = check(assistant, consumer, "gguf", PICTURES, QUESTION, 8)
    assert [row.answer for row in parity.pictures] == ANSWERS
    whole = tmp_path / "f32"
    whole.mkdir()
    export.export_gguf_f32(assistant, whole)
    for file in (export.MODEL_FILE, export.MMPROJ_FILE):
        assert (tmp_path / file).stat().st_size < (whole / file).stat().st_size


def test_the_language_model_alone(tmp_path: Path) -> None:
    assistant = trained("gemma3")
    consumer = export.export_gguf_text(assistant, tmp_path, "f32")
    assert [path.name for path in tmp_path.iterdir()] == [export.MODEL_FILE]
    assert len(consumer.questions) == 10
    consumer.questions = ANSWERS
    parity = check(assistant, consumer, "gguf_text", max_new_tokens=8)
    assert [row.answer for row in parity.pictures] == ANSWERS


def test_clip_is_refused_while_llama_cpp_misplaces_its_class_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are right: a model that makes llama.cpp's mistake gives its answers."""
    assistant = trained("clip")
    with pytest.raises(ExportError, match="has a class token"):
        export.export_gguf_f32(assistant, tmp_path)
    monkeypatch.setattr(assistant.model, "encode_images", partial(class_token_last, assistant.model))
    check(assistant, export.LlamaCpp(tmp_path, assistant, "f32"), "gguf", PICTURES, QUESTION, 8)


def class_token_last(model: VLM, pixels: Tensor) -> Tensor:
    """float [N, 3, H, W] -> [N, P, E] as llama.cpp's issue 25814 describes it."""
    vision: Any = model.vision
    parts = vision.embeddings
    patches = parts.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [N, P, E]
    x = torch.cat([patches, parts.class_embedding.expand(len(pixels), 1, -1)], 1) + parts.position_embedding.weight
    x = vision.pre_layrnorm(x)
    for layer in vision.encoder.layers[: gguf_vision.num_layers_read(model)]:
        x = layer(x, None)
    features: Tensor = x[:, 1:]
    return features


@pytest.mark.parametrize("name", list(CASES))
def test_words_become_the_same_tokens_in_llama_cpp(name: str, tmp_path: Path) -> None:
    assistant = assistant_of(CASES[name])
    consumer = export.export_gguf_text(assistant, tmp_path)
    texts = ["the reed", "  two  spaces", "it's 1234!\n\nred\tthe", "naïve 日本 🙂", "don't\r\n  re-read 3.14"]
    for text in texts:
        own = assistant.processor.tokenizer(text, add_special_tokens=False).input_ids
        assert post(consumer, "/tokenize", {"content": text, "add_special": False})["tokens"] == own, text


def post(consumer: export.LlamaCpp, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        consumer.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_a_picture_in_llama_cpp_stands_where_training_put_it(tmp_path: Path) -> None:
    """Also in a second turn, which asks about another picture."""
    assistant = assistant_of(CASES["qwen3"])
    consumer = export.export_gguf(assistant, tmp_path)
    url = {"url": export.data_url(PICTURES[0])}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    prompt = post(consumer, "/apply-template", {"messages": [*turns, turns[0]]})["prompt"]
    media = prompt.partition("\n")[0]
    assert media.startswith("<__media")
    assert prompt == f"{media}\nHuman: what?\nAssistant: red<eos>\n{media}\nHuman: what?\nAssistant:"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_kinds_of_tensors(dtype: Any) -> None:
    kinds = gguf.GGMLQuantizationType
    vector, matrix, odd, kernel = torch.rand(64), torch.rand(3, 64), torch.rand(3, 48), torch.rand(2, 3, 4, 4)
    assert export.packed("v.class_embd", vector, dtype)[1] == kinds.F32
    assert export.packed("v.position_embd.weight", matrix, dtype)[1] == kinds.F32
    values, kind = export.packed("mm.0.weight", matrix, dtype)
    assert kind == kinds[dtype.upper()]
    np.testing.assert_allclose(gguf.quants.dequantize(values, kind).reshape(3, 64), matrix, atol=4e-3)
    assert export.packed("mm.0.weight", odd, dtype)[1] == (kinds.F16 if dtype == "q8_0" else kinds[dtype.upper()])
    assert export.packed("v.patch_embd.weight", kernel, dtype)[1] == (kinds.F32 if dtype == "f32" else kinds.F16)


def test_a_linear_layer_through_gelu() -> None:
    layer = nn.Linear(5, 3)
    first, second = gguf_vision.through_gelu(layer)
    x = 4 * torch.randn(7, 5)
    for kind in ("none", "tanh"):
        through = second(nn.functional.gelu(first(x), approximate=kind))
        torch.testing.assert_close(through, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
def test_a_prepared_picture_has_the_pixels_of_the_processor(mode: str) -> None:
    processor = make_processor("raw")
    processor.image_processor = EyespotImageProcessor(
        size=16, resize_mode=mode, image_mean=(0.48, 0.46, 0.41), image_std=(0.27, 0.26, 0.28)
    )
    noise = np.random.default_rng(0).integers(0, 256, (40, 23, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise)
    small = export.prepared(processor, picture)
    assert small.size == (16, 16)
    torch.testing.assert_close(processor.pixel_values([small]), processor.pixel_values([picture]), rtol=0, atol=0)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"vision": "vit"}, "its encoder is 'eyespot_vit'"),
        ({"vision": "clip", "keep_cls": True, "num_image_tokens": 5}, "its connector reads the class token"),
        ({"vision": "siglip", "vision_positions": 2}, "its connector is told the patches' places"),
        ({"vision": "siglip", "image_attention": "bidirectional"}, "its image tokens see each other"),
        ({"vision": "siglip", "connector": {"name": "pixel_shuffle", "factor": 2}}, "its connector joins patches"),
        ({"vision": "siglip", "connector": {"name": "mlp", "factor": 2}}, "its connector joins patches"),
        ({"vision": "siglip", "connector": {"name": "mlp", "depth": 3}}, "its connector is 'mlp' .3 linear layers"),
        ({"vision": "siglip", "connector": {"name": "mlp", "norm": True}}, "its connector is 'mlp'"),
        ({"vision": "siglip", "connector": {"name": "perceiver", "num_queries": 2}}, "its connector is 'perceiver'"),
    ],
)
def test_pictures_that_llama_cpp_cannot_read(parts: dict[str, Any], reason: str) -> None:
    model, processor = make_vlm(**parts), make_processor("raw")
    with pytest.raises(ExportError, match=reason):
        gguf_vision.check_vision(model, processor)
        gguf_vision.two_layers(model)


@pytest.mark.parametrize(
    ("language", "changed", "reason"),
    [
        ("gpt", {}, "the language model is 'eyespot_gpt'"),
        ("gemma2", {}, "the language model is 'gemma2'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act of the language model is 'gelu'"),
        ("gemma3", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar of the language model is 16"),
        ("gemma3", {"final_logit_softcapping": 2.0}, "final_logit_softcapping of the language model is 2.0"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window of the language model is True"),
    ],
)
def test_words_that_llama_cpp_cannot_compute(language: str, changed: dict[str, Any], reason: str) -> None:
    model = LANGUAGES[language]()
    for name, value in changed.items():
        setattr(model.config, name, value)
    with pytest.raises(ExportError, match=reason):
        gguf_text.check_language(model)


def test_a_pattern_of_layers_that_llama_cpp_lacks() -> None:
    slide, full = "sliding_attention", "full_attention"
    assert gguf_text.full_attention_period([slide, slide, full, slide, slide, full, slide]) == 3
    assert gguf_text.full_attention_period([slide, slide]) == 3
    with pytest.raises(ExportError, match=r"full-attention layers are \[1, 3\]"):
        gguf_text.full_attention_period([full, slide, full])


def test_prompts_that_llama_cpp_would_cut_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="all pictures stand before all words"):
        fitting_prompts(make_processor("raw", image_mode="prefix"))
    monkeypatch.setattr("eyespot.export.gguf_prompts.copies_beside_marks", lambda tokenizer, texts: {})
    with pytest.raises(ExportError, match="cuts its prompts into other tokens than training did"):
        fitting_prompts(make_processor("plain", "bpe"))  # which needs a second id, see below


@pytest.mark.parametrize(
    ("style", "names"),
    [
        ("raw", []),
        ("chatml", []),
        ("gemma", []),
        ("zephyr", []),
        ("plain", [" \ue000"]),
        ("llama3", ["\n\n\ue000"]),  # in front of a word GPT-2 cuts two line ends apart
    ],
)
def test_only_tokens_beside_typed_words_get_a_second_id(style: str, names: list[str]) -> None:
    processor = make_processor(style, "bpe")
    copies = fitting_prompts(processor).copies
    assert list(copies) == names
    assert [processor.tokenizer.decode(token) for token in copies.values()] == [name[:-1] for name in names]


def test_a_tokenizer_that_llama_cpp_lacks(tmp_path: Path) -> None:
    case = dataclasses.replace(CASES["gemma3"], tokens=lambda: char_tokenizer("abcdefghijklmnopqrstuvwxyz? "))
    with pytest.raises(ExportError, match="no tokenizer that cuts words as this one"):
        export.export_gguf_text(assistant_of(case), tmp_path)


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImportError, match=r'pip install "eyespot\[gguf\]"'):
        export.export_gguf(Assistant(make_vlm(), make_processor("raw"), "cpu"), tmp_path)
