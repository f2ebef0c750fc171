"""Greedy answers to many prompts at once, all prompts about the same pictures behind one image prefix.

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
from eyespot.processing.processor import Encoded

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
    """New tokens of each prompt, without the end token.

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
    ends = torch.tensor(sorted(end_ids), device=device)
    for step in range(max_new_tokens):
        tokens = model.compute_logits(hidden).argmax(-1)
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
    return answers


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
