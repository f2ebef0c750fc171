"""How tokens are chosen, and how they become text."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, TopPLogitsWarper

from eyespot.processing.tokenizers import byte_tokenizer
from eyespot.serving.pieces import Pieces
from eyespot.serving.sampling import Sampler, Sampling, log_probabilities

LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.5, float("-inf"), 0.0])


def drawn(number: int = 4000, **sampling: float) -> Counter[int]:
    sampler = Sampler(Sampling(seed=3, **sampling))  # type: ignore[arg-type]
    return Counter(sampler._draw(LOGITS.double()) for _ in range(number))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(-1)
        found = drawn(temperature=temperature)
        for token, probability in enumerate(expected.tolist()):
            # five standard deviations of a count
            assert abs(found[token] / 4000 - probability) <= 5 * (probability * (1 - probability) / 4000) ** 0.5


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 0.95])
def test_the_nucleus_is_that_of_transformers(top_p: float) -> None:
    kept = TopPLogitsWarper(top_p)(None, LOGITS[None]).isfinite()[0].nonzero().flatten().tolist()
    assert sorted(drawn(top_p=top_p, temperature=1.0)) == kept


def test_extreme_settings_give_a_token() -> None:
    for temperature in (1e-300, 1e-6, 2.0):
        assert Sampler(Sampling(temperature, seed=0)).choose(LOGITS) in (range(6) if temperature == 2 else [0])
    assert Sampler(Sampling(1.0, top_p=1e-300)).choose(LOGITS) == 0


def test_penalties_count_what_was_said() -> None:
    sampler = Sampler(Sampling(presence_penalty=0.4, frequency_penalty=0.3))
    # 2.0, then 1.3 < 1.5, then 1.3 > 0.8, then 1.0 > 0.8, then 0.7 < 0.8
    assert [sampler.choose(LOGITS) for _ in range(5)] == [0, 3, 0, 0, 3]
    assert LOGITS[0] == 2.0
    assert Sampling().is_greedy and not Sampling(presence_penalty=0.1).is_greedy


def test_log_probabilities() -> None:
    own, top = log_probabilities(LOGITS, 3, 2)
    expected = LOGITS.log_softmax(-1)
    assert own == pytest.approx(expected[3].item())
    assert top == [(0, pytest.approx(expected[0].item())), (3, pytest.approx(expected[3].item()))]
    assert log_probabilities(LOGITS, 3, 0)[1] == []


# --- text ------------------------------------------------------------------------------------------------------------

TOKENIZER = byte_tokenizer()


def decode(tokens: list[int], tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def pieces_of(text: str, *stops: str) -> tuple[list[str], bool]:
    """What is handed out for the bytes of a text, one token each."""
    pieces, found = Pieces(decode, stops), []
    for token in TOKENIZER(text, add_special_tokens=False).input_ids:
        found.append(pieces.add(token))
        if pieces.stopped:
            return found, True
    return [*found, pieces.end()], False


def test_no_character_is_cut() -> None:
    text = "naïve 漢字 \N{FAMILY}\N{ZERO WIDTH JOINER}\N{BOY} end"
    pieces, _ = pieces_of(text)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert pieces[:2] == ["n", "a"]  # at once, not at the end


def test_bytes_that_are_no_character_are_marked_at_the_end() -> None:
    pieces = Pieces(decode)
    start = [pieces.add(token) for token in TOKENIZER("ab", add_special_tokens=False).input_ids]
    assert start == ["a", "b"] and pieces.add(0xE6 + 4) == "" and pieces.end().endswith("\ufffd")


def test_outer_space_is_held_back() -> None:
    assert pieces_of("  \n a  b \n ")[0] == ["", "", "", "", "a", "", "", "  b", "", "", "", ""]


def test_stops_are_found_across_tokens_and_nothing_of_them_is_shown() -> None:
    pieces, stopped = pieces_of("one, STOP two", "STOP", "never")
    assert "".join(pieces) == "one," and stopped
    pieces, stopped = pieces_of("one, STO two", "STOP")
    assert "".join(pieces) == "one, STO two" and not stopped
    assert pieces_of("aab", "ab") == (["", "a", ""], True)
    assert pieces_of("\nx", "\n") == ([""], True)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.text(alphabet="ab \né漢", max_size=14), st.lists(st.text(alphabet="ab \n漢", min_size=1, max_size=3), max_size=3)
)
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, stopped = pieces_of(text, *stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    said = text[: min(ends)] if ends else text  # what had come when the first stop was complete
    starts = [place for stop in stops if (place := said.find(stop)) >= 0]
    assert "".join(pieces) == said[: min(starts, default=len(said))].strip()
    assert all(not piece or not piece.endswith("\ufffd") for piece in pieces)
