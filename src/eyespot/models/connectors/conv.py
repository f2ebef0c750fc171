"""Patches look at their neighbours before they become tokens: convolutions on the grid, then a projector."""

from __future__ import annotations

from torch import Tensor, nn

from eyespot.models.connectors.mlp import MLPConnector
from eyespot.models.vision.positions import grid_side

GROUP_WIDTH = 16  # channels that are normalised together: GroupNorm, arXiv 1803.08494


class ConvConnector(nn.Module):
    """[N, P, E] -> [N, P, D] through ``depth`` convolutions of 3 x 3 patches and two linear layers.

    That neighbourhoods kept together help with questions about places is shown in Honeybee, arXiv 2312.06742, whose
    C-Abstractor has more and deeper blocks.

    Args:
        vision_dim: E. language_dim: D.
        depth: number of convolutions, at least 1.
        conv_dim: their width, a multiple of 16.
        hidden_dim: width between the linear layers; by default 2 x D.
    """

    keeps_grid = True  # tokens are in the order of the patches

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        *,
        depth: int = 1,
        conv_dim: int = 256,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"conv depth is {depth}; at least 1 convolution is needed")
        if conv_dim < 1 or conv_dim % GROUP_WIDTH:
            raise ValueError(f"conv conv_dim is {conv_dim}; give a multiple of {GROUP_WIDTH}")
        widths = [vision_dim, *[conv_dim] * depth]
        layers: list[nn.Module] = []
        for i in range(depth):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.GroupNorm(conv_dim // GROUP_WIDTH, conv_dim), nn.GELU()]
        self.convs = nn.Sequential(*layers)
        self.project = MLPConnector(conv_dim, language_dim, hidden_dim=hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, P, D]."""
        side = grid_side(features.shape[1])
        grid = features.transpose(1, 2).unflatten(2, (side, side))  # [N, E, side, side]
        out: Tensor = self.project(self.convs(grid).flatten(2).transpose(1, 2))
        return out

    @staticmethod
    def num_tokens(num_patches: int) -> int:
        """Tokens out for tokens in."""
        grid_side(num_patches)
        return num_patches
