"""Where a model reads texts in order to compare them with pictures: a connector's text side, or its language model.

Both are asked the same four things. What they read of a picture is called ``images``: the encoder's features, or the
connector's output. What they read of a text beside a picture are ``ids`` and ``mask``, int64 [N, T]: the columns of a
batch that ``columns`` names.

Shape letters: N pairs, P patches, K image tokens, T tokens, E vision width, D language width, H Q-Former width, W
width of the side (H or D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eyespot.models.loss import IGNORE_INDEX, causal_loss, supervised_hidden
from eyespot.models.merge import placeholder_mask

if TYPE_CHECKING:
    from eyespot.models.vlm import VLM

Batch = dict[str, Tensor]


def text_side(model: VLM) -> QFormerSide | LanguageSide:
    """The side of a model that has an alignment head."""
    return LanguageSide(model) if getattr(model.connector, "text", None) is None else QFormerSide(model)


class QFormerSide:
    """BLIP-2's first stage: the Q-Former alone. Source: arXiv 2301.12597, section 3.1."""

    columns = ("text_ids", "text_mask")

    def __init__(self, model: VLM) -> None:
        self.model = model
        self.qformer: Any = model.connector
        self.decode_id = int((model.config.alignment or {})["decode_id"])

    def images(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, P, E]: the queries read the features anew beside each text."""
        return self.model.connector_inputs(features)

    def image_states(self, images: Tensor) -> Tensor:
        """float [N, P, E] -> the queries without any text, float [N, K, H]."""
        states: Tensor = self.qformer.query_states(images)
        return states

    def text_states(self, batch: Batch) -> Tensor:
        """The state of each text's first token, float [N, H]."""
        states: Tensor = self.qformer.text_states(batch["text_ids"], batch["text_mask"])[:, 0]
        return states

    def match_states(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The queries of pictures that see their texts, float [N, K, H]."""
        queries: Tensor = self.qformer.joint_states(images, ids, mask, causal=False)[0]
        return queries

    def num_targets(self, batch: Batch) -> int:
        """Tokens that ``caption_loss`` predicts."""
        return int((self._labels(batch)[:, 1:] != IGNORE_INDEX).sum())

    def caption_loss(self, images: Tensor, batch: Batch, num_items: int) -> Tensor:
        """Each word from the queries and the words before it; the first token says that this is captioning.

        The cross-entropy is summed and divided by ``num_items``, as in ``eyespot.models.loss.causal_loss``.
        """
        ids = batch["text_ids"].clone()
        ids[:, 0] = self.decode_id
        hidden = self.qformer.joint_states(images, ids, batch["text_mask"], causal=True)[1]
        states, targets = supervised_hidden(hidden, self._labels(batch))
        return F.cross_entropy(self.qformer.text_logits(states).float(), targets, reduction="sum") / num_items

    @staticmethod
    def _labels(batch: Batch) -> Tensor:
        return batch["text_ids"].masked_fill(batch["text_mask"] == 0, IGNORE_INDEX)


class LanguageSide:
    """Any connector: the language model reads the texts, alone or behind the image tokens."""

    columns = ("input_ids", "attention_mask")

    def __init__(self, model: VLM) -> None:
        self.model = model

    def images(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> image embeddings float [N, K, D]."""
        return self.model.embed_images(image_features=features)

    def image_states(self, images: Tensor) -> Tensor:
        """float [N, K, D] -> their mean, float [N, 1, D]."""
        return images.mean(dim=1, keepdim=True)

    def text_states(self, batch: Batch) -> Tensor:
        """The state of each text's last token, which has seen all others, float [N, D]."""
        embeds = self.model.embed_text(batch["text_ids"])
        return last_states(self._hidden(embeds, batch["text_ids"], batch["text_mask"]), batch["text_mask"])

    def match_states(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The state at the end of each text behind its picture, float [N, 1, D]."""
        return last_states(self._joint(images, ids, mask), mask).unsqueeze(1)

    def num_targets(self, batch: Batch) -> int:
        """Tokens that ``caption_loss`` predicts."""
        return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    def caption_loss(self, images: Tensor, batch: Batch, num_items: int) -> Tensor:
        """The VLM's own loss."""
        hidden = self._joint(images, batch["input_ids"], batch["attention_mask"])
        return causal_loss(self.model.language, hidden, batch["labels"], num_items)

    def _joint(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self._hidden(self.model.embed(ids, images), ids, mask)

    def _hidden(self, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        is_image = placeholder_mask(ids, self.model.config.image_token_id).long()
        hidden: Tensor | None = self.model(
            inputs_embeds=embeds, mm_token_type_ids=is_image, attention_mask=mask, skip_logits=True, use_cache=False
        ).last_hidden_state
        assert hidden is not None
        return hidden


def last_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """The state of the last real token: float [N, T, W], int64 [N, T] (padding on the right) -> float [N, W]."""
    last = mask.sum(dim=1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
