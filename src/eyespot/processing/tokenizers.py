"""Tokenizers that need no download: one token per byte, one per character, or pieces learned from texts."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        # Removing spaces before punctuation would change what the model wrote.
        clean_up_tokenization_spaces=False,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte: 4 special tokens, then byte b as id b + 4, 260 in all. No text is ever unknown.

    Text that may contain the special strings, such as a user's, must be encoded with `split_special_tokens=True`:
    then "<eos>" is five bytes. No special token is added by itself.
    Source: byte pair encoding without merges (Sennrich et al., arXiv 1508.07909), with the byte fallback of
    https://github.com/google/sentencepiece.
    """
    words = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=UNK, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _wrap(tokenizer)


def char_tokenizer(alphabet: str | Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per Unicode character: 4 special tokens, then the characters in code point order.

    Any other character becomes "<unk>", one for each. No special token is added by itself.

    Args:
        alphabet: the characters, as one text or as any number of texts; repetitions do not matter.

    Raises:
        ValueError: no character at all.
    """
    characters = sorted(set("".join(alphabet)))
    if not characters:
        raise ValueError("the alphabet is empty; give the characters, or texts that contain them")
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *characters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=UNK, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte pair encoding learned from texts: frequent words become one token, and no text is ever unknown.

    Source: Sennrich et al., arXiv 1508.07909, over bytes as in the GPT-2 report, section 2.2.

    Args:
        texts: what to learn from, questions and answers alike.
        vocab_size: at most so many tokens, the 4 special ones and the 256 bytes included.

    Raises:
        ValueError: fewer tokens than the bytes need.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < (least := len(SPECIALS) + len(alphabet)):
        raise ValueError(f"vocab_size is {vocab_size}, the bytes and special tokens alone need {least}; give more")
    tokenizer = Tokenizer(BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)
