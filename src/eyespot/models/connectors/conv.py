"""Patches look at their neighbours before they become tokens: convolutions on the grid, then a projector. Of the cells
of the grid, only those that may hold something need become tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyespot.models.connectors.mlp import MLPConnector
from eyespot.models.detection import iou
from eyespot.models.vision.positions import grid_side

GROUP_WIDTH = 16  # channels that are normalised together: GroupNorm, arXiv 1803.08494
NUM_DIGITS = 10
HALF_A_BOX = 0.12  # of the picture: how far the edges of a new model's boxes are from the centres of their cells
SHARPNESS = 4.0  # of the step from an empty cell to a full one
HALF_FULL = -0.75  # score in the middle of it: a stage of kind detect scores what is there below 0 rather than too high
SAME_PLACE, SAME_NAME = 0.4, 0.8  # overlap (IoU) of boxes and cosine of names from which on two cells mean one thing
SUPPRESSED = 1e4  # taken off the score of a cell that repeats another


class Cells(NamedTuple):
    """What every cell of the grid would be as a token, float [N, P, D]; how much it is worth keeping, float [N, P], and
    its box, left, top, right and bottom as shares of the picture, float [N, P, 4], where a connector knows them."""

    tokens: Tensor
    scores: Tensor | None = None
    boxes: Tensor | None = None


class ConvConnector(nn.Module):
    """[N, P, E] -> [N, K, D] through ``depth`` convolutions of 3 x 3 patches and two linear layers; K is ``keep`` or P.

    That neighbourhoods kept together help with questions about places is shown in Honeybee, arXiv 2312.06742, whose
    C-Abstractor has more and deeper blocks.

    Args:
        vision_dim: E. language_dim: D.
        depth: number of convolutions, at least 1.
        conv_dim: their width, a multiple of 16.
        hidden_dim: width between the linear layers; by default 2 x D.
        keep: so many cells become tokens, in the order of the grid: those that score highest. What scores mean is
            taught by a stage of kind detect (see DetectModule); words alone cannot teach it. None keeps all.
        boxes: each kept cell becomes five tokens: what is there, and the four edges of its box in the digits of the
            language model. An edge between two tenths of the picture is between their digits, so that nothing is
            rounded. Cells that repeat a better one (see ``distinct``) are not kept, and those with low scores fade into
            a blank. Needs ``keep``; ``learn_digits`` gives the digits.
        numbers: a sixth token, behind the first: how many of the kept cells say the same name, as a digit. Needs
            ``boxes``, without which one thing may be said twice. After the counting module for questions about
            pictures of Zhang et al., arXiv 1802.05766, which also leaves out what is there twice.
        from_left: behind all others, the names of the kept cells once more, in the order of the middles of their boxes
            from left to right. The order of the grid says what is above what; digits must be compared to find out what
            is left of what, which takes a language model much longer to learn (docs/log.md). Needs ``boxes``.
    """

    keeps_grid = True  # tokens, or all cells, are in the order of the patches

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        *,
        depth: int = 1,
        conv_dim: int = 256,
        hidden_dim: int | None = None,
        keep: int | None = None,
        boxes: bool = False,
        numbers: bool = False,
        from_left: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"conv depth is {depth}; at least 1 convolution is needed")
        if conv_dim < 1 or conv_dim % GROUP_WIDTH:
            raise ValueError(f"conv conv_dim is {conv_dim}; give a multiple of {GROUP_WIDTH}")
        if keep is not None and keep < 1:
            raise ValueError(f"conv keep is {keep}; give at least 1, or null for all cells")
        if boxes and keep is None:
            raise ValueError("conv boxes is true, but keep is null; say how many cells become tokens with their boxes")
        if numbers and not boxes:
            raise ValueError("conv numbers is true, but boxes is false; what may be there twice cannot be counted")
        if from_left and not boxes:
            raise ValueError("conv from_left is true, but boxes is false; only boxes say what is left of what")
        widths = [vision_dim, *[conv_dim] * depth]
        layers: list[nn.Module] = []
        for i in range(depth):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.GroupNorm(conv_dim // GROUP_WIDTH, conv_dim), nn.GELU()]
        self.convs = nn.Sequential(*layers)
        self.project = MLPConnector(conv_dim, language_dim, hidden_dim=hidden_dim)
        self.keep, self.score = keep, nn.Linear(conv_dim, 1) if keep is not None else None
        self.edges: nn.Linear | None = None
        self.numbers, self.from_left = numbers, from_left
        if boxes:
            self.edges = nn.Linear(conv_dim, 4)
            with torch.no_grad():
                self.edges.bias.copy_(torch.tensor([-1.0, -1.0, 1.0, 1.0]) * HALF_A_BOX)
            self.digits = nn.Parameter(torch.randn(NUM_DIGITS, language_dim) * language_dim**-0.5)
            self.blank = nn.Parameter(torch.randn(language_dim) * language_dim**-0.5)
            self.size = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def learn_digits(self, digits: Tensor, blank: Tensor) -> None:
        """Take over how a language model embeds the digits, float [10, D], and what stands for nothing, float [D]."""
        self.digits.copy_(digits)
        self.blank.copy_(blank)
        self.size.copy_(digits.norm(dim=-1).mean())

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, K, D]; with boxes [N, 5 K, D], numbers and from_left K more each."""
        if self.keep is None:
            out: Tensor = self.project(self._cells(features))
            return out
        if self.edges is not None:
            return self._told(self.all_cells(features))
        cells = self._cells(features)
        tokens: Tensor = self.project(_chosen(cells, self._best(cells)))
        return tokens

    def _best(self, cells: Tensor) -> Tensor:
        """Those that score highest, in the order of the grid: float [N, P, conv_dim] -> int64 [N, K]."""
        assert self.score is not None and self.keep is not None
        return self.score(cells).squeeze(-1).topk(self.keep, dim=1).indices.sort(dim=1).values  # type: ignore[no-any-return]

    def _told(self, cells: Cells) -> Tensor:
        """What the kept cells say, float [N, 5 to 7 K, D]."""
        assert cells.scores is not None and cells.boxes is not None and self.keep is not None
        kept, new = distinct(cells, self.keep)
        filled = (SHARPNESS * (cells.scores.gather(1, kept) - HALF_FULL)).sigmoid() * new
        names = F.normalize(_chosen(cells.tokens, kept), dim=-1)
        said = [(names * self.size).unsqueeze(2)]
        if self.numbers:
            said.append(self._spoken(_numbers(names, filled)).unsqueeze(2))
        boxes = _chosen(cells.boxes, kept)
        said.append(self._spoken(boxes * NUM_DIGITS - 0.5))
        share = filled[..., None, None].to(names.dtype)
        told = share * torch.cat(said, dim=2) + (1 - share) * self.blank  # [N, K, 5 or 6, D]
        if not self.from_left:
            return told.flatten(1, 2)
        return torch.cat([told.flatten(1, 2), _chosen(told[:, :, 0], _across(boxes))], dim=1)

    @torch.no_grad()
    def cells_of_tokens(self, features: Tensor) -> Tensor:
        """Of which cell each token tells: float [N, P, E] -> int64 [N, K]."""
        if self.keep is None:
            return torch.arange(features.shape[1], device=features.device).expand(len(features), -1)
        if self.edges is None:
            return self._best(self._cells(features))
        cells = self.all_cells(features)
        assert cells.boxes is not None
        kept, _ = distinct(cells, self.keep)
        told = kept.repeat_interleave(5 + self.numbers, dim=1)
        if not self.from_left:
            return told
        return torch.cat([told, kept.gather(1, _across(_chosen(cells.boxes, kept)))], dim=1)

    def all_cells(self, features: Tensor) -> Cells:
        """float [N, P, E] -> what every cell would be."""
        cells = self._cells(features)
        return Cells(
            self.project(cells),
            None if self.score is None else self.score(cells).squeeze(-1),
            None if self.edges is None else self._boxes(cells),
        )

    def _boxes(self, cells: Tensor) -> Tensor:
        """float [N, P, conv_dim] -> edges as shares of the picture, float [N, P, 4]; they may lie outside of it."""
        assert self.edges is not None
        side = grid_side(cells.shape[1])
        middle = (torch.arange(side, device=cells.device, dtype=cells.dtype) + 0.5) / side
        down, across = torch.meshgrid(middle, middle, indexing="ij")
        centres = torch.stack([across, down, across, down], dim=-1).flatten(0, 1)
        boxes: Tensor = centres + self.edges(cells)
        return boxes

    def _spoken(self, values: Tensor) -> Tensor:
        """float [...] -> float [..., D]: the digit of a whole number from 0 to 9; between two of them, both mixed."""
        values = values.clamp(0, NUM_DIGITS - 1).unsqueeze(-1)
        shares = (1 - (values - torch.arange(NUM_DIGITS, device=values.device)).abs()).clamp(min=0)
        spoken: Tensor = shares.to(self.digits.dtype) @ self.digits
        return spoken

    def _cells(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, P, conv_dim]."""
        side = grid_side(features.shape[1])
        grid = features.transpose(1, 2).unflatten(2, (side, side))  # [N, E, side, side]
        out: Tensor = self.convs(grid).flatten(2).transpose(1, 2)
        return out

    def num_tokens(self, num_patches: int) -> int:
        """Tokens out for tokens in.

        Raises:
            ValueError: they are no square grid, or fewer than are kept.
        """
        grid_side(num_patches)
        if self.keep is not None and self.keep > num_patches:
            raise ValueError(f"conv keep is {self.keep}, but there are {num_patches} cells; lower it")
        return (self.keep or num_patches) * (1 if self.edges is None else 5 + self.numbers + self.from_left)


def _across(boxes: Tensor) -> Tensor:
    """Boxes from left to right, by their middles: float [N, K, 4] -> int64 [N, K]."""
    return (boxes[..., 0] + boxes[..., 2]).argsort(dim=1)


def _chosen(cells: Tensor, kept: Tensor) -> Tensor:
    """float [N, P, C], int64 [N, K] -> float [N, K, C]."""
    return cells.gather(1, kept.unsqueeze(-1).expand(-1, -1, cells.shape[-1]))


@torch.no_grad()
def _numbers(names: Tensor, filled: Tensor) -> Tensor:
    """How many full cells say what each one says: directions float [N, K, D], shares float [N, K] -> float [N, K]."""
    return ((names @ names.transpose(1, 2) > SAME_NAME) & (filled > 0.5).unsqueeze(1)).sum(-1).to(filled.dtype)


@torch.no_grad()
def distinct(cells: Cells, number: int) -> tuple[Tensor, Tensor]:
    """The cells that score highest, without those that repeat a better one: nearly the same box, nearly the same name.

    Greedy non-maximum suppression per name, as detectors do it (Girshick et al., arXiv 1311.2524, section 2.2).

    Returns:
        Which cells, in the order of the grid, int64 [N, number], and whether each is new, bool [N, number]: where fewer
        are, repeats make up the number.
    """
    assert cells.scores is not None and cells.boxes is not None
    names, boxes = F.normalize(cells.tokens.float(), dim=-1), cells.boxes.float()
    alike = (iou(boxes.unsqueeze(2), boxes.unsqueeze(1)) > SAME_PLACE) & (names @ names.transpose(1, 2) > SAME_NAME)
    waiting, pictures = cells.scores.float().clone(), torch.arange(names.shape[0], device=names.device)
    kept, new = [], []
    for _ in range(number):
        score, best = waiting.max(dim=1)
        kept.append(best)
        new.append(score > -SUPPRESSED / 2)
        waiting -= SUPPRESSED * alike[pictures, best]
        waiting[pictures, best] = -torch.inf
    order = torch.stack(kept, dim=1).sort(dim=1)
    return order.values, torch.stack(new, dim=1).gather(1, order.indices)
