"""Greedy answers to many prompts at once, and how likely given answers are, all prompts about the same pictures behind
one image prefix.

The rows are those of packed training (``eyespot.data.packing``), so a prompt computes what it would compute alone; an
answer grows as new columns at the end of its row, seen by its own branch only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eyespot.data.packing import fill_rows, last_places, pack, share_prefixes
from eyespot.models.attention import separable
from eyespot.models.vlm import VLM
from eyespot.processing.processor import IGNORE_INDEX, Encoded

TOKENS_AT_ONCE = 256  # of which all logits are held
ROW_LENGTH = 512  # tokens; longer rows waste attention on masked places, shorter ones cut more prefixes
PADDING = {"documents": -1, "branches": 0, "position_ids": 0}


def can_branch(model: VLM) -> bool:
    """Whether the language model takes rows with structure: positions, a mask of ours, and a cache of keys."""
    config = model.language.config.get_text_config()
    return separable(config) and "position_ids" in model.language_inputs and "past_key_values" in model.language_inputs


@torch.inference_mode()
def greedy(
    model: VLM,
    prompts: Sequence[tuple[Encoded, list[Any], Hashable]],
    encode: Callable[[list[Any]], Tensor],
    max_new_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
) -> list[list[int]]:
    """The first of what ``greedy_scored`` returns."""
    return greedy_scored(model, prompts, encode, max_new_tokens, end_ids, pad_id)[0]


@torch.inference_mode()
def greedy_scored(
    model: VLM,
    prompts: Sequence[tuple[Encoded, list[Any], Hashable]],
    encode: Callable[[list[Any]], Tensor],
    max_new_tokens: int,
    end_ids: Collection[int],
    pad_id: int,
) -> tuple[list[list[int]], list[float]]:
    """New tokens of each prompt, without the end token, and the log-probability of each answer, end token included.

    Args:
        model: in evaluation mode; ``can_branch`` holds.
        prompts: (encoded, pictures, key that is equal for equal pictures) of each.
        encode: pictures -> features float [N, P, E].
        max_new_tokens: limit of each answer. end_ids: tokens that end one. pad_id: fills rows.
    """
    documents = share_prefixes(prompts, model.config.image_token_id, ROW_LENGTH)
    rows = fill_rows(documents, ROW_LENGTH)
    batch, images = pack(rows, pad_id)
    device = model.device
    structure = {name: batch[name].to(device) for name in PADDING}
    tips = [(row, *tip) for row, documents in enumerate(rows) for tip in last_places(documents)]
    tip_rows, members, places = (torch.tensor(column, device=device) for column in zip(*tips, strict=True))
    tip_structure = {name: values[tip_rows, places] for name, values in structure.items()}
    cache = DynamicCache()  # of whole rows: a sliding window counts positions, and the mask knows them
    output = model(
        batch["input_ids"].to(device),
        image_features=encode(images) if images else None,
        past_key_values=cache,
        use_cache=True,
        skip_logits=True,
        **structure,
    )
    hidden = output.last_hidden_state[tip_rows, places]  # [S, D]
    answers: list[list[int]] = [[] for _ in prompts]
    log_probs = torch.zeros(len(prompts), device=device)
    ends = torch.tensor(sorted(end_ids), device=device)
    for step in range(max_new_tokens):
        logits = model.compute_logits(hidden)
        best, tokens = logits.max(-1)
        log_probs[members] += best.float() - logits.float().logsumexp(-1)
        going = ~torch.isin(tokens, ends)
        tokens, tip_rows, members = tokens[going], tip_rows[going], members[going]
        tip_structure = {name: values[going] for name, values in tip_structure.items()}
        for member, token in zip(members.tolist(), tokens.tolist(), strict=True):
            answers[member].append(token)
        if len(tokens) == 0 or step == max_new_tokens - 1:
            break
        tip_structure["position_ids"] = tip_structure["position_ids"] + 1
        slots = _slots(tip_rows)
        in_columns = partial(_columns, shape=(len(rows), int(slots.max()) + 1), rows=tip_rows, slots=slots)
        structure = {
            name: torch.cat([values, in_columns(tip_structure[name], PADDING[name])], dim=1)
            for name, values in structure.items()
        }
        new_ids = in_columns(tokens, pad_id)
        output = model(new_ids, past_key_values=cache, use_cache=True, skip_logits=True, **structure)
        hidden = output.last_hidden_state[tip_rows, slots]
    return answers, log_probs.tolist()


@torch.inference_mode()
def answer_scores(
    model: VLM, rows: Sequence[tuple[Encoded, list[Any], Hashable]], encode: Callable[[list[Any]], Tensor], pad_id: int
) -> tuple[list[float], list[bool]]:
    """Of each row the log-probability of its supervised tokens, and whether greedy decoding would have said them.

    Args: as ``greedy``, but rows end with their answers.
    """
    filled = fill_rows(share_prefixes(rows, model.config.image_token_id, ROW_LENGTH), ROW_LENGTH)
    batch, images = pack(filled, pad_id)
    owners = torch.cat([_owners(last_places(documents), batch["labels"].shape[1]) for documents in filled])
    places = (batch["labels"] != IGNORE_INDEX).nonzero()
    structure = {name: batch[name].to(model.device) for name in PADDING}
    output = model(
        batch["input_ids"].to(model.device),
        image_features=encode(images) if images else None,
        skip_logits=True,
        **structure,
    )
    row, place = places.unbind(1)
    log_probs, greedy_too = token_scores(
        model, output.last_hidden_state[row, batch["previous"][row, place]], batch["labels"][row, place]
    )
    return sum_by_owner(log_probs, greedy_too, owners[row * batch["labels"].shape[1] + place], len(rows))


def token_scores(model: VLM, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token behind a hidden state, float32 [S], and whether it is the likeliest, bool [S].

    Args:
        hidden: float [S, D]. tokens: int64 [S].
    """
    pieces = []
    for states, wanted in zip(
        hidden.split(TOKENS_AT_ONCE), tokens.to(hidden.device).split(TOKENS_AT_ONCE), strict=True
    ):
        logits = model.compute_logits(states).float()
        own = logits.gather(1, wanted[:, None]).squeeze(1)
        pieces.append((own - logits.logsumexp(-1), logits.argmax(-1) == wanted))
    log_probs, likeliest = zip(*pieces, strict=True)
    return torch.cat(log_probs).cpu(), torch.cat(likeliest).cpu()


def sum_by_owner(log_probs: Tensor, likeliest: Tensor, owners: Tensor, number: int) -> tuple[list[float], list[bool]]:
    """Sums of float32 [S], and whether all of bool [S] hold, for each of so many owners int64 [S]."""
    sums = torch.zeros(number).index_add_(0, owners, log_probs)
    misses = torch.zeros(number).index_add_(0, owners, (~likeliest).float())
    return sums.tolist(), (misses == 0).tolist()


def _owners(tips: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Which sample each place of a row belongs to, int64 [T]; only places of answers are meant to be asked for."""
    members, ends = (torch.tensor(column) for column in zip(*tips, strict=True))
    owners: Tensor = members[torch.searchsorted(ends, torch.arange(length)).clamp(max=len(ends) - 1)]
    return owners


def _columns(values: Tensor, padding: int, shape: tuple[int, int], rows: Tensor, slots: Tensor) -> Tensor:
    """Entry i of values at [rows[i], slots[i]], padding elsewhere: int64 [S] -> int64 of that shape."""
    filled = torch.full(shape, padding, device=values.device)
    filled[rows, slots] = values
    return filled


def _slots(rows: Tensor) -> Tensor:
    """The how-manieth entry of its row each entry is: int64 [S], sorted by row -> int64 [S]."""
    counts = torch.bincount(rows)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - starts[rows]
