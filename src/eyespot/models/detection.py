"""What is where: a head that reads objects off image tokens, and the losses that teach it.

Names live in the space of the language model's own word embeddings, so that a token which the head understands is close
to the words that the language model knows. The head has no table of classes: any name can be looked for.
Source of comparing regions with words: Li et al., GLIP, arXiv 2112.03857.

Shape letters: N images, K tokens of each, in rows of a square grid; M names, L tokens of the longest name, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyespot.models.vision.positions import grid_side

INITIAL_SCALE, INITIAL_BIAS = 12.0, -8.4  # even odds at a cosine of 0.7: names that share a word stay below it

BOX_SCALE = 1.5  # an edge of the picture takes a third of a token's length: enough to be read, little beside its name


class Detection(nn.Module):
    """Reads from an image token which names have their centre in its cell, and the box around it.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.box = nn.Linear(width, 4)
        nn.init.constant_(self.box.bias, 0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS))

    def name_logits(self, tokens: Tensor, names: Tensor) -> Tensor:
        """tokens float [N, K, D], names float [M, D] -> float32 [N, K, M]: is an object of this name centred here?"""
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 would blur what the scale then magnifies
            cosines = F.normalize(tokens.float(), dim=-1) @ F.normalize(names.float(), dim=-1).t()
        return self.log_scale.exp() * cosines + self.bias

    def boxes(self, tokens: Tensor) -> Tensor:
        """tokens float [..., D] -> edges float32 [..., 4]: left, top, right, bottom as shares of the picture.

        Each is read along one direction, whose length is fixed, or a box would become a whisper that no language model
        hears. Nothing else is needed: a token knows where it is.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            along = F.normalize(tokens.float(), dim=-1) @ F.normalize(self.box.weight, dim=-1).t()
        return BOX_SCALE * along + self.box.bias


@dataclass(frozen=True)
class Objects:
    """Objects of N pictures: image, name int64 [O], box float32 [O, 4] as shares of the picture."""

    image: Tensor
    name: Tensor
    box: Tensor

    def cells(self, num_tokens: int) -> Tensor:
        """The token in whose cell each centre lies, int64 [O]."""
        side = grid_side(num_tokens)
        x, y = ((self.box[:, :2] + self.box[:, 2:]) / 2 * side).long().clamp(0, side - 1).unbind(1)
        return y * side + x


def name_vectors(embeddings: nn.Module, name_ids: Tensor) -> Tensor:
    """The mean embedding of each name's tokens, without a gradient.

    name_ids int64 [M, L], token ids plus one, 0 behind the end -> float32 [M, D].
    """
    with torch.no_grad():
        real = (name_ids > 0).unsqueeze(-1)
        embeds = embeddings((name_ids - 1).clamp(min=0)).float() * real
        vectors: Tensor = embeds.sum(1) / real.sum(1).clamp(min=1)
    return vectors


def name_targets(objects: Objects, shape: torch.Size) -> Tensor:
    """1 where an object of that name is centred, float32 of the shape [N, K, M]."""
    targets = torch.zeros(shape, device=objects.name.device)
    targets[objects.image, objects.cells(shape[1]), objects.name] = 1.0
    return targets


def name_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every cell and name, weighted by how wrong it is, summed.

    Source: quality focal loss, arXiv 2006.04388, equation 3, with its exponent 2.

    Args:
        logits, targets: float32 [N, K, M].
    """
    surprise = (logits.sigmoid() - targets).square()
    return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * surprise).sum()


def word_loss(tokens: Tensor, names: Tensor, objects: Objects) -> Tensor:
    """1 - cosine between the token of each object and its name, summed: what a language model is to read as a word has
    to be close to the word, not just closer to it than to others.

    Args:
        tokens: float [N, K, D]. names: float [M, D]. objects: O of them.
    """
    own = tokens[objects.image, objects.cells(tokens.shape[1])].float()
    return (1 - F.cosine_similarity(own, names[objects.name].float(), dim=-1)).sum()


def count_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """How far the probabilities of a name over all cells add up to another number than there are objects, summed.

    Source of counting by a sum over places: Lempitsky and Zisserman, "Learning to count objects in images", NIPS 2010.

    Args:
        logits, targets: float32 [N, K, M].
    """
    return F.smooth_l1_loss(logits.sigmoid().sum(1), targets.sum(1), reduction="sum")


def box_loss(boxes: Tensor, truth: Tensor, num_tokens: int) -> Tensor:
    """Distance of the edges in cells of the grid, averaged over the four, and 1 - GIoU, summed over objects.

    Source: generalized intersection over union, arXiv 1902.09630; both together: DETR, arXiv 2005.12872.

    Args:
        boxes, truth: float32 [O, 4].
    """
    distance = (boxes - truth).abs().mean(dim=1) * grid_side(num_tokens)
    return (distance + 1 - generalized_iou(boxes, truth)).sum()


def generalized_iou(one: Tensor, other: Tensor) -> Tensor:
    """float32 [O, 4], [O, 4] -> [O], in [-1, 1]; what is no box has area 0."""
    around = _area(torch.cat([torch.minimum(one, other)[:, :2], torch.maximum(one, other)[:, 2:]], dim=1))
    shared, either = _shared_and_either(one, other)
    return shared / either.clamp(min=1e-9) - (around - either) / around.clamp(min=1e-9)


def iou(one: Tensor, other: Tensor) -> Tensor:
    """float32 [..., 4], [..., 4] -> [...], in [0, 1]: of tensors what ``eyespot.data.boxes.iou`` is of two boxes."""
    shared, either = _shared_and_either(one, other)
    return shared / either.clamp(min=1e-9)


def _shared_and_either(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Areas that both cover, and that at least one of them covers, float32 [...] each."""
    shared = _area(torch.cat([torch.maximum(one, other)[..., :2], torch.minimum(one, other)[..., 2:]], dim=-1))
    return shared, _area(one) + _area(other) - shared


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
