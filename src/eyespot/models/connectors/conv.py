"""Patches look at their neighbours before they become tokens: convolutions on the grid, then a projector. Of the cells
of the grid, only those that may hold something need become tokens."""

from __future__ import annotations

from torch import Tensor, nn

from eyespot.models.connectors.mlp import MLPConnector
from eyespot.models.vision.positions import grid_side

GROUP_WIDTH = 16  # channels that are normalised together: GroupNorm, arXiv 1803.08494


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
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"conv depth is {depth}; at least 1 convolution is needed")
        if conv_dim < 1 or conv_dim % GROUP_WIDTH:
            raise ValueError(f"conv conv_dim is {conv_dim}; give a multiple of {GROUP_WIDTH}")
        if keep is not None and keep < 1:
            raise ValueError(f"conv keep is {keep}; give at least 1, or null for all cells")
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

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, K, D]."""
        cells = self._cells(features)
        if self.score is not None:
            kept = self.score(cells).squeeze(-1).topk(self.keep, dim=1).indices.sort(dim=1).values  # [N, K]
            cells = cells.gather(1, kept.unsqueeze(-1).expand(-1, -1, cells.shape[-1]))
        out: Tensor = self.project(cells)
        return out

    def all_cells(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """float [N, P, E] -> what every cell would be as a token, float [N, P, D], and their scores [N, P], if any."""
        cells = self._cells(features)
        return self.project(cells), None if self.score is None else self.score(cells).squeeze(-1)

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
        return self.keep or num_patches
