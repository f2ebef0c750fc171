"""Texts that grow together, one token each step; new ones join and finished ones leave between two steps.

Letters in shapes: B rows, T columns, G rows that join together, D language width, V vocabulary, H heads of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from eyespot.branching import can_branch
from eyespot.inference import FEATURE_BYTES, PREFIX_BYTES, Assistant
from eyespot.models.attention import LAYER_TYPES
from eyespot.models.merge import positions_from_mask
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Encoded
from eyespot.serving.memory import Memory

ENCODED_AT_ONCE = 16  # pictures


class Picture(NamedTuple):
    """digest: of its file or pixels. pixels: float [3, H, W], what the encoder is given."""

    digest: bytes
    pixels: Tensor


@dataclass(frozen=True)
class Prompt:
    """Tokens up to where an answer begins, and the pictures of their placeholders.

    prefix_length: tokens up to the last picture; 0 without one, or when nothing stands behind it.
    """

    ids: list[int]
    pictures: tuple[Picture, ...]
    prefix_length: int

    @property
    def prefix_key(self) -> Hashable:
        return tuple(picture.digest for picture in self.pictures), tuple(self.ids[: self.prefix_length])


Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, float [H, T, D / heads]."""


class Rows:
    """The rows that are being answered, padded on the left.

    Attributes:
        mask: int64 [B, T], 0 on padding. cache: keys and values of the T columns.
    """

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.model: VLM = assistant.model
        check_grows(self.model)
        self.shares = can_branch(self.model)
        self.features: Memory[Tensor] = Memory(FEATURE_BYTES)
        self.prefixes: Memory[Prefix] = Memory(PREFIX_BYTES)
        self.clear()

    def __len__(self) -> int:
        return len(self.mask)

    def clear(self) -> None:
        """Let all rows go."""
        self.cache = DynamicCache()
        self.mask = torch.zeros(0, 0, dtype=torch.int64, device=self.model.device)

    def known(self, prompt: Prompt) -> Prefix | None:
        """The beginning of a prompt, if it was computed lately for another one."""
        return self.prefixes.get(prompt.prefix_key) if self.shares and prompt.prefix_length else None

    def add(self, prompts: Sequence[Prompt]) -> Tensor:
        """New rows behind the others; returns the logits of their first tokens, float [G, V].

        Beginnings are taken from memory if all of the prompts have theirs there.
        """
        prefixes = [prefix for prompt in prompts if (prefix := self.known(prompt)) is not None]
        if len(prefixes) == len(prompts):
            cache, mask, logits = self._behind_prefixes(prompts, prefixes)
        else:
            cache, mask, logits = self._from_the_start(prompts)
        if len(self):
            _join(self.cache, cache)
            length = max(self.mask.shape[1], mask.shape[1])
            mask = torch.cat([F.pad(part, (length - part.shape[1], 0)) for part in (self.mask, mask)])
        else:
            self.cache = cache
        self.mask = mask
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token in each row: B of them -> the logits behind them, float [B, V]."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        output = self.model(
            torch.tensor(tokens, device=self.model.device).unsqueeze(1),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            skip_logits=True,
        )
        return self.model.compute_logits(output.last_hidden_state[:, -1])

    def keep(self, rows: Sequence[int]) -> None:
        """Let the other rows go, and the columns that only they needed."""
        if not rows:
            self.clear()
            return
        chosen = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[chosen]
        first = int(self.mask.any(0).long().argmax())
        self.mask = self.mask[:, first:]
        _change(self.cache, lambda part: part[chosen, :, first:])

    def _from_the_start(self, prompts: Sequence[Prompt]) -> tuple[DynamicCache, Tensor, Tensor]:
        """Cache, mask [G, T] and logits [G, V] of whole prompts; what stands up to their last pictures is kept."""
        ids, mask = self._padded([prompt.ids for prompt in prompts])
        cache = DynamicCache()
        pictures = [picture for prompt in prompts for picture in prompt.pictures]
        output = self.model(
            ids,
            attention_mask=mask,
            image_features=self._encoded(pictures) if pictures else None,
            past_key_values=cache,
            use_cache=True,
            skip_logits=True,
        )
        for row, prompt in enumerate(prompts):
            if self.shares and prompt.prefix_length:
                start = mask.shape[1] - len(prompt.ids)
                self._keep_prefix(prompt, cache, row, slice(start, start + prompt.prefix_length))
        return cache, mask, self.model.compute_logits(output.last_hidden_state[:, -1])

    def _keep_prefix(self, prompt: Prompt, cache: DynamicCache, row: int, columns: slice) -> None:
        prefix: Prefix = []
        layer: Any
        for layer in cache.layers:
            prefix.append((layer.keys[row, :, columns].clone(), layer.values[row, :, columns].clone()))
        self.prefixes.put(prompt.prefix_key, prefix, sum(part.nbytes for layer in prefix for part in layer))

    def _behind_prefixes(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Prefix]
    ) -> tuple[DynamicCache, Tensor, Tensor]:
        """The same of prompts whose beginnings were kept. Between beginning and rest a row may have padding; the mask
        is one of positions, which does not mind, and in the end the padding is moved to the left."""
        lengths = torch.tensor([prompt.prefix_length for prompt in prompts])
        longest = int(lengths.max())
        before = (torch.arange(longest) >= longest - lengths.unsqueeze(1)).long().to(self.model.device)
        cache = DynamicCache()
        for index, layers in enumerate(zip(*prefixes, strict=True)):
            keys, values = zip(*layers, strict=True)
            cache.update(_stacked(keys, longest), _stacked(values, longest), index)
        ids, rest = self._padded([prompt.ids[prompt.prefix_length :] for prompt in prompts])
        mask = torch.cat([before, rest], dim=1)
        output = self.model(
            ids,
            documents=mask - 1,
            branches=torch.zeros_like(mask),
            position_ids=positions_from_mask(mask),
            past_key_values=cache,
            use_cache=True,
            skip_logits=True,
        )
        mask = _without_gaps(cache, mask)
        return cache, mask, self.model.compute_logits(output.last_hidden_state[:, -1])

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask int64 [G, T], padded on the left."""
        batch = self.assistant.processor.pad([Encoded(ids, ids, 0) for ids in rows], "left")
        return batch["input_ids"].to(self.model.device), batch["attention_mask"].to(self.model.device)

    def _encoded(self, pictures: Sequence[Picture]) -> Tensor:
        """Patch features float [N, P, E]; a picture that was encoded lately is not encoded again."""
        found = {picture.digest: self.features.get(picture.digest) for picture in pictures}
        missing = list({p.digest: p for p in pictures if found[p.digest] is None}.values())
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            some = missing[start : start + ENCODED_AT_ONCE]
            encoded = self.model.encode_images(torch.stack([p.pixels for p in some]).to(self.model.device))
            for picture, features in zip(some, encoded, strict=True):
                found[picture.digest] = own = features.clone()  # not a part of the batch, which would stay too
                self.features.put(picture.digest, own, own.nbytes)
        return torch.stack([features for picture in pictures if (features := found[picture.digest]) is not None])


def check_grows(model: VLM) -> None:
    """Refuse a language model without a cache of keys and values in all layers.

    Raises:
        ValueError: it has none, or layers of another kind.
    """
    config = model.language.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or []) - LAYER_TYPES
    if others or "past_key_values" not in model.language_inputs:
        what = f"layers of type {min(others)!r}" if others else "no cache of keys and values"
        raise ValueError(f"{config.model_type} has {what}, so answers cannot join and leave a batch; use `eyespot ask`")


def _change(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> None:
    """Replace keys and values float [B, H, T, D / heads] of all layers."""
    layer: Any
    for layer in cache.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)


def _stretched(part: Tensor, length: int) -> Tensor:
    """float [..., t, D] -> float [..., length, D], zeros on the left."""
    return F.pad(part, (0, 0, length - part.shape[-2], 0))


def _stacked(parts: Sequence[Tensor], length: int) -> Tensor:
    """float [H, t, D] of several lengths -> float [G, H, length, D]."""
    return torch.stack([_stretched(part, length) for part in parts])


def _join(cache: DynamicCache, other: DynamicCache) -> None:
    """Put the rows of another cache behind those of the first; the shorter one is padded on the left."""
    length = max(cache.get_seq_length(), other.get_seq_length())
    layer: Any
    more: Any
    for layer, more in zip(cache.layers, other.layers, strict=True):
        layer.keys = torch.cat([_stretched(layer.keys, length), _stretched(more.keys, length)])
        layer.values = torch.cat([_stretched(layer.values, length), _stretched(more.values, length)])


def _without_gaps(cache: DynamicCache, mask: Tensor) -> Tensor:
    """Move all padding to the left, in the cache and in its mask int64 [G, T], which is returned."""
    order = mask.argsort(dim=-1, stable=True)[:, -int(mask.sum(-1).max()) :]
    columns = order[:, None, :, None]
    _change(cache, lambda part: part.gather(2, columns.expand(-1, part.shape[1], -1, part.shape[3])))
    return mask.gather(1, order)
