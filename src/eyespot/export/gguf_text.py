"""The language model, its tokenizer and its chat template as llama.cpp reads them from a GGUF file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The names of tensors come from the package gguf; what
llama.cpp does with them was read in its sources (src/models, src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eyespot.export.gguf_prompts import Prompts
from eyespot.export.parity import refuse
from eyespot.processing.processor import Processor

if TYPE_CHECKING:
    from gguf import GGUFWriter

# model_type of transformers -> architecture of llama.cpp
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
OTHERS = "export onnx or merged instead"
SUFFIXES = (".weight", ".bias")


def check_language(language: Any) -> None:
    """Refuse a language model that llama.cpp computes in another way than transformers."""
    config = language.config.get_text_config()
    kind = config.model_type
    if kind not in ARCHITECTURES:
        refuse("gguf", f"the language model is {kind!r}, GGUF is written for {', '.join(ARCHITECTURES)}", OTHERS)
    wanted: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_activation": "gelu_pytorch_tanh",
        "use_sliding_window": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "query_pre_attn_scalar": getattr(config, "head_dim", None),
    }
    if kind != "llama":
        wanted["attention_bias"] = False
    for name, value in wanted.items():
        if (found := getattr(config, name, value)) != value:
            refuse("gguf", f"{name} of the language model is {found!r}, llama.cpp computes with {value!r}", OTHERS)


# --- sizes -------------------------------------------------------------------------------------------------------


def add_sizes(writer: GGUFWriter, language: Any, num_words: int) -> None:
    """What llama.cpp has to know before it reads tensors."""
    config = language.config.get_text_config()
    head_dim = head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(num_words)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(full_attention_period(config.layer_types))
        ropes = config.rope_parameters
        writer.add_rope_freq_base(plain_theta(ropes["full_attention"]))
        writer.add_rope_freq_base_swa(plain_theta(ropes["sliding_attention"]))
    else:
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: Any) -> int:
    """Positions up to which llama.cpp computes the same: it has no sliding window for the llama architecture."""
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def full_attention_period(layer_types: list[str]) -> int:
    """p, where every p-th layer sees everything and all others a window: the only pattern llama.cpp has for Gemma 3."""
    full = [i + 1 for i, kind in enumerate(layer_types) if kind == "full_attention"]
    period = full[0] if full else len(layer_types) + 1
    if full != list(range(period, len(layer_types) + 1, period)):
        refuse("gguf", f"its full-attention layers are {full}, llama.cpp wants them at equal distances", OTHERS)
    return period


def plain_theta(rope: dict[str, Any]) -> float:
    """The base of unscaled rotary positions."""
    if rope.get("rope_type", "default") != "default":
        refuse(
            "gguf", f"its rotary positions are scaled ({rope['rope_type']!r}), which Gemma 3 is not given here", OTHERS
        )
    return float(rope["rope_theta"])


# --- tensors -----------------------------------------------------------------------------------------------------


def language_tensors(language: Any, copied: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Names of llama.cpp and tensors; a head that shares the embedding's weight is left out, as llama.cpp expects.

    Args:
        copied: tokens that get a second id; their embeddings are copied, and the head never prefers a copy.
    """
    import gguf

    config = language.config.get_text_config()
    architecture = ARCHITECTURES[config.model_type]
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names: Any = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    tied = language.get_output_embeddings().weight is language.get_input_embeddings().weight
    for name, tensor in language.state_dict().items():
        if name == "lm_head.weight":
            if tied and not copied:
                continue
            # the mean row gives the mean logit, which is never the largest
            tensor = torch.cat([tensor, tensor.mean(0, keepdim=True).expand(len(copied), -1)])
        if name == "model.embed_tokens.weight":
            tensor = torch.cat([tensor, tensor[copied]])
        if architecture == "llama" and (found := re.search(r"\.([qk])_proj\.", name)):
            heads = config.num_attention_heads if found.group(1) == "q" else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1  # transformers multiplies by 1 + weight, llama.cpp by weight
        yield names.get_name(name, SUFFIXES), tensor
    if (factors := rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors


def interleaved(tensor: Tensor, num_heads: int) -> Tensor:
    """[heads * 2 * half, ...]: the rows of each head from halves (transformers rotates i with i + half) to pairs
    (llama.cpp rotates 2i with 2i + 1)."""
    rows = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides rotary frequencies by, float32 [head_dim / 2]; None where they are not scaled."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if config.model_type == "gemma3_text" or kind == "default":
        return None
    if config.model_type not in ("llama", "mistral") or kind not in ("llama3", "linear"):
        refuse("gguf", f"its rotary positions are scaled ({kind!r})", OTHERS)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    size = head_size(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    factors: Tensor = (plain / scaled).float()
    return factors


# --- words -------------------------------------------------------------------------------------------------------

# Pre-tokenizers that llama.cpp knows: (digits of one token, the expression that cuts words) -> its name.
# Source: src/llama-vocab.cpp of llama.cpp, LLAMA_VOCAB_PRE_TYPE_*
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORD_CUTS = {
    (False, None): "gpt-2",
    (True, None): "smollm",
    (False, _QWEN): "qwen2",
    (False, _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")): "llama-bpe",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type


def add_words(writer: GGUFWriter, processor: Processor, prompts: Prompts, vocab_size: int) -> None:
    """The tokenizer: BPE over bytes (as GPT-2) or over pieces of text with bytes to fall back on (SentencePiece)."""
    tokenizer = processor.tokenizer
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        refuse("gguf", f"its tokenizer is {described['model']['type']}, GGUF is written for BPE", OTHERS)
    cut = word_cut(described["pre_tokenizer"])
    words, kinds = typed_words(tokenizer, vocab_size)
    words, kinds = words + list(prompts.copies), kinds + [CONTROL] * len(prompts.copies)
    if cut is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut)
        writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    elif is_byte_by_byte(described):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["<pad> <pad>"])  # llama.cpp wants a list that is not empty; this one never applies
        words = [byte_letter(word) if kind == BYTE else word for word, kind in zip(words, kinds, strict=True)]
        kinds = [NORMAL if kind == BYTE else kind for kind in kinds]
    elif described["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(piece_scores(words, described["model"]["merges"]))
        writer.add_add_space_prefix(has_space_prefix(described))
        words = [w.replace("▁", " ") if kind == USER_DEFINED else w for w, kind in zip(words, kinds, strict=True)]
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = UNKNOWN
    else:
        refuse("gguf", "llama.cpp has no tokenizer that cuts words as this one", OTHERS)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    for name in ("bos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    end = processor.end_of_turn_id
    writer.add_eos_token_id(end if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
    writer.add_eot_token_id(end)
    writer.add_add_bos_token(processor.add_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(prompts.template)


def word_cut(described: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for a byte-level pre-tokenizer; None if it is none, or one that llama.cpp does not know."""
    steps = (described or {}).get("pretokenizers", [described] if described else [])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps[:-1])
    cuts = [step["pattern"].get("Regex") for step in steps[:-1] if step["type"] == "Split"]
    if len(cuts) + digits != len(steps) - 1 or len(cuts) > 1 or bool(cuts) == steps[-1]["use_regex"]:
        return None
    return WORD_CUTS.get((digits, cuts[0] if cuts else None))


def is_byte_by_byte(described: dict[str, Any]) -> bool:
    """Whether every byte is a token and nothing else is (``eyespot.processing.tokenizers.byte_tokenizer``)."""
    model = described["model"]
    return bool(model.get("byte_fallback")) and not model["merges"] and described["normalizer"] is None


def byte_letter(word: str) -> str:
    """ "<0x41>" -> the letter that stands for this byte in byte-level vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return str(bytes_to_unicode()[int(word[3:5], 16)])


def typed_words(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[int]]:
    """The words of all ids and their kinds; ids without a word are marked unused."""
    words = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for word, i in tokenizer.get_vocab().items():
        if i >= vocab_size:  # the model has no row for it
            continue
        words[i], kinds[i] = word, BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", word) else NORMAL
    for i, token in tokenizer.added_tokens_decoder.items():
        if i >= vocab_size:
            continue
        words[i], kinds[i] = token.content, CONTROL if token.special else USER_DEFINED
    return words, kinds


def piece_scores(words: list[str], merges: list[list[str]]) -> list[float]:
    """Minus the rank of the merge that makes a piece: llama.cpp joins the pair whose piece has the highest score."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(word, len(ranks))) for word in words]


def has_space_prefix(described: dict[str, Any]) -> bool:
    """Whether a text is tokenized as if a space stood before it."""
    text = json.dumps([described["normalizer"], described["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text
