"""The byte, character and learned tokenizers lose nothing and survive saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eyespot.processing.tokenizers import SPECIALS, bpe_tokenizer, byte_tokenizer, char_tokenizer

BYTES = byte_tokenizer()
TEXTS = ["is there a red shape?", "is there a blue shape?", "what shape is it?", "red", "blue", "yes", "no"] * 3
LEARNED = bpe_tokenizer(TEXTS, 300)
HARD = [
    "",
    " ",
    "  two  spaces , and . dots !  do n't",
    "\n\r\n\t\x00 end\n",
    "naïve e\u0301 \u00a0\u200b 日本語 👩‍👩‍👧‍👦 🇨🇭 \U0010ffff",
    "<eos> <bos><pad> </s> <unk><0x41>▁Ġ##",
]
words = st.text() | st.lists(st.sampled_from([*SPECIALS, " ", "\n", "🙂", "<0xFF>", "a"])).map("".join)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=True, split_special_tokens=True)["input_ids"]
    return found


@pytest.mark.parametrize("text", HARD)
def test_bytes_are_the_utf8_bytes(text: str) -> None:
    assert encode(BYTES, text) == [byte + 4 for byte in text.encode()]
    assert BYTES.decode(encode(BYTES, text)) == text


@settings(max_examples=200, deadline=None)
@given(words)
def test_bytes_lose_nothing(text: str) -> None:
    found = encode(BYTES, text)
    assert BYTES.decode(found) == text == BYTES.decode(found, skip_special_tokens=True)
    assert not set(found) & set(BYTES.all_special_ids)


def test_special_tokens_are_tokens_only_when_meant() -> None:
    assert len(BYTES) == 260 and sorted(BYTES.all_special_ids) == [0, 1, 2, 3]
    assert (BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_id, BYTES.unk_token_id) == (0, 1, 2, 3)
    assert BYTES.encode("a<eos>") == [ord("a") + 4, BYTES.eos_token_id]
    assert len(encode(BYTES, "a<eos>")) == 6
    assert BYTES.decode([1, ord("a") + 4, 2], skip_special_tokens=True) == "a"


def test_padding_and_masks() -> None:
    batch = BYTES(["ab", "c"], padding=True)
    assert batch["attention_mask"] == [[1, 1], [1, 0]]
    assert batch["input_ids"][1][1] == BYTES.pad_token_id


@pytest.mark.parametrize("tokenizer", [BYTES, char_tokenizer("ab <>eos.,!'\n日"), LEARNED], ids=["byte", "char", "bpe"])
def test_saved_and_loaded_offline(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.clean_up_tokenization_spaces is False
    for text in [*HARD, "a b , ! 's  日\n<eos>"]:
        assert encode(loaded, text) == encode(tokenizer, text)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(encode(loaded, text)) == tokenizer.decode(encode(tokenizer, text))


@given(st.text(alphabet="abc ,.!'\n日🙂", max_size=30))
@settings(max_examples=100, deadline=None)
def test_characters_of_the_alphabet_lose_nothing(text: str) -> None:
    tokenizer = CHARS
    found = encode(tokenizer, text)
    assert len(found) == len(text)
    assert tokenizer.decode(found) == text


CHARS = char_tokenizer(["abc", " ,.!'\n", "日🙂a"])


def test_unknown_characters_are_counted_one_by_one() -> None:
    assert len(CHARS) == 4 + len(set("abc ,.!'\n日🙂"))
    assert encode(CHARS, "aXYb") == [*encode(CHARS, "a"), 3, 3, *encode(CHARS, "b")]
    assert CHARS.decode(encode(CHARS, "aX")) == "a<unk>"


def test_the_order_of_the_alphabet_does_not_matter() -> None:
    assert char_tokenizer("cba").get_vocab() == char_tokenizer(iter(["a", "bca"])).get_vocab()
    assert char_tokenizer("cba").convert_ids_to_tokens([4, 5, 6]) == ["a", "b", "c"]


@pytest.mark.parametrize("alphabet", ["", [], ["", ""]])
def test_an_empty_alphabet_is_an_error(alphabet: list[str]) -> None:
    with pytest.raises(ValueError, match="alphabet is empty"):
        char_tokenizer(alphabet)


def test_frequent_words_become_one_token() -> None:
    assert len(encode(LEARNED, "is there a red shape?")) <= 6
    assert len(encode(LEARNED, "blue")) == 1
    assert len(LEARNED) <= 300
    assert bpe_tokenizer(TEXTS, 300).get_vocab() == LEARNED.get_vocab()


@settings(max_examples=200, deadline=None)
@given(words)
def test_learned_pieces_lose_nothing(text: str) -> None:
    found = encode(LEARNED, text)
    assert LEARNED.decode(found) == text
    assert not set(found) & set(LEARNED.all_special_ids)


def test_too_small_a_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocab_size is 100, the bytes and special tokens alone need 260"):
        bpe_tokenizer(TEXTS, 100)
