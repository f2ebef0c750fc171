"""Patches look at their neighbours before they become tokens: convolutions on the grid, then a projector. Of the cells
of the grid, only those that may hold something need become tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyespot.models.connectors.mlp import MLPConnector
from eyespot.models.vision.positions import grid_side

GROUP_WIDTH = 16  # channels that are normalised together: GroupNorm, arXiv 1803.08494
NUM_DIGITS = 10
HALF_A_BOX = 0.12  # of the picture: how far the edges of a new model's boxes are from the centres of their cells
SHARPNESS = 4.0  # of the step from an empty cell to a full one


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
            rounded. Cells with scores below 0 fade into a blank. Needs ``keep``; ``learn_digits`` gives the digits.
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
        """float [N, P, E] -> float [N, K, D], or [N, 5 K, D] with boxes."""
        cells = self._cells(features)
        if self.score is None:
            out: Tensor = self.project(cells)
            return out
        scores = self.score(cells).squeeze(-1)
        kept = scores.topk(self.keep, dim=1).indices.sort(dim=1).values  # [N, K]
        chosen = self._chosen(cells, kept)
        names = self.project(chosen)
        if self.edges is None:
            tokens_alone: Tensor = names
            return tokens_alone
        named = F.normalize(names, dim=-1) * self.size
        spoken = torch.cat([named.unsqueeze(2), self._spoken(self._chosen(self._boxes(cells), kept))], dim=2)
        filled = (SHARPNESS * scores.gather(1, kept)).sigmoid()[..., None, None]
        tokens: Tensor = filled * spoken + (1 - filled) * self.blank
        return tokens.flatten(1, 2)

    def all_cells(self, features: Tensor) -> Cells:
        """float [N, P, E] -> what every cell would be."""
        cells = self._cells(features)
        return Cells(
            self.project(cells),
            None if self.score is None else self.score(cells).squeeze(-1),
            None if self.edges is None else self._boxes(cells),
        )

    @staticmethod
    def _chosen(cells: Tensor, kept: Tensor) -> Tensor:
        """float [N, P, C], int64 [N, K] -> float [N, K, C]."""
        return cells.gather(1, kept.unsqueeze(-1).expand(-1, -1, cells.shape[-1]))

    def _boxes(self, cells: Tensor) -> Tensor:
        """float [N, P, conv_dim] -> edges as shares of the picture, float [N, P, 4]; they may lie outside of it."""
        assert self.edges is not None
        side = grid_side(cells.shape[1])
        middle = (torch.arange(side, device=cells.device, dtype=cells.dtype) + 0.5) / side
        down, across = torch.meshgrid(middle, middle, indexing="ij")
        centres = torch.stack([across, down, across, down], dim=-1).flatten(0, 1)
        boxes: Tensor = centres + self.edges(cells)
        return boxes

    def _spoken(self, boxes: Tensor) -> Tensor:
        """float [..., 4] -> float [..., 4, D]: a digit where an edge is in the middle of its tenth, else two mixed."""
        tenths = (boxes * NUM_DIGITS - 0.5).clamp(0, NUM_DIGITS - 1).unsqueeze(-1)
        shares = (1 - (tenths - torch.arange(NUM_DIGITS, device=boxes.device)).abs()).clamp(min=0)
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
        return (self.keep or num_patches) * (1 if self.edges is None else 5)
