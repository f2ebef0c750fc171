"""Chat templates in the styles of well-known models, in our own words, and tokenizers that fit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eyespot.processing.images import EyespotImageProcessor
from eyespot.processing.processor import Processor
from eyespot.processing.prompt import TEMPLATES
from eyespot.processing.tokenizers import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as ChatML, but an answer of the training text opens with an empty thought that the open question lacks
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content | trim ~ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(first='') %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.first = m.content | trim ~ '\n\n' %}{% else %}"
    "{% if (m.role == 'assistant') != (loop.previtem is defined and loop.previtem.role == 'user') %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ ns.first if m.role == 'user' else '' }}{{ m.content | trim }}<end_of_turn>\n"
    "{% if m.role == 'user' %}{% set ns.first = '' %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n"
    "{% else %}\n{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# no words of its own before an answer
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Style:
    """A chat template with the tokens of its tokenizer. ``own``: added tokens besides pad, bos, eos and unk."""

    template: str
    own: tuple[str, ...] = ()
    end_of_turn: str = "<eos>"
    add_bos: bool = False


STYLES = {
    "plain": Style(TEMPLATES["plain"]),
    "plain with BOS": Style(TEMPLATES["plain"], add_bos=True),
    "raw": Style(TEMPLATES["raw"]),
    "chatml": Style(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": Style(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", add_bos=True),
    "gemma": Style(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", add_bos=True),
    "zephyr": Style(ZEPHYR, ("<|user|>", "<|system|>", "<|assistant|>")),
    "brackets": Style(BRACKETS, ("[INST]", "[/INST]"), add_bos=True),
}
Kind = Literal["bytes", "bpe", "pieces"]


def make_tokenizer(kind: Kind, own: tuple[str, ...] = (), special: bool = True) -> PreTrainedTokenizerBase:
    """A tokenizer with added tokens of a template.

    Args:
        kind: "bytes" (ours), "bpe" (merges over bytes, as GPT-2) or "pieces" (a space before every text, as Llama 2).
        own: added tokens. special: whether they are marked as special.
    """
    tokenizer = byte_tokenizer() if kind == "bytes" else _trained(kind)
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": list(own)})
    else:
        tokenizer.add_tokens(list(own))
    return tokenizer


def _trained(kind: Kind) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    if kind == "bpe":
        letters, merges = (
            sorted(pre_tokenizers.ByteLevel.alphabet()),
            [("Ġ", "t"), ("Ġ", "T"), ("h", "e"), ("r", "e"), ("Ċ", "Ċ")],
        )
        tokenizer = Tokenizer(BPE(vocab=_vocabulary(specials + letters, merges), merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        letters = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
        merges = [("▁", "t"), ("h", "e"), ("r", "e"), ("▁t", "he")]
        vocabulary = _vocabulary(specials + letters, merges)
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.add_special_tokens(specials)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _vocabulary(words: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    return {word: i for i, word in enumerate([*words, *(a + b for a, b in merges)])}


def make_processor(style: str, kind: Kind = "bytes", **settings: Any) -> Processor:
    """A processor for pictures of 16 pixels; 3 placeholders for each, beyond the vocabulary."""
    chosen = STYLES[style]
    tokenizer = make_tokenizer(kind, chosen.own)
    arguments = {
        "chat_template": chosen.template,
        "add_bos": chosen.add_bos,
        "image_token_id": len(tokenizer),
        "num_image_tokens": 3,
    }
    return Processor(EyespotImageProcessor(size=16), tokenizer, **{**arguments, **settings})
