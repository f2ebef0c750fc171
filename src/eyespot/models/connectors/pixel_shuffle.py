"""Fewer, wider tokens: neighbouring patches joined into one (pixel shuffle), then one linear layer."""

from __future__ import annotations

import math

from torch import Tensor, nn


def join_patches(features: Tensor, factor: int) -> Tensor:
    """float [N, P, E] -> float [N, P / factor^2, E * factor^2]: each square of patches, row by row, as one token."""
    if factor == 1:
        return features
    num_images, num_patches, width = features.shape
    rows = math.isqrt(joined_tokens(num_patches, factor))
    x = features.view(num_images, rows, factor, rows, factor, width)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(num_images, rows * rows, factor * factor * width)


def joined_tokens(num_patches: int, factor: int) -> int:
    """Tokens that ``join_patches`` makes.

    Raises:
        ValueError: the patches are not a square grid whose side the factor divides.
    """
    side = math.isqrt(num_patches)
    if factor > 1 and (side * side != num_patches or side % factor):
        raise ValueError(
            f"connector factor {factor} does not fit {num_patches} patches; it needs a square grid whose side it "
            "divides (drop the CLS token, or choose another image size or factor)"
        )
    return num_patches // factor**2


class PixelShuffleConnector(nn.Module):
    """[N, P, E] -> [N, P / factor^2, D] (Idefics3, arXiv 2408.12637; nanoVLM, github.com/huggingface/nanoVLM).

    Each square of ``factor`` x ``factor`` patches, read row by row, becomes one token of width E * factor^2.
    """

    keeps_grid = True  # tokens are in the order of the patches

    def __init__(self, vision_dim: int, language_dim: int, *, factor: int = 2, bias: bool = False) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"pixel_shuffle factor is {factor}; at least 1 is needed")
        self.factor = factor
        self.proj = nn.Linear(vision_dim * factor**2, language_dim, bias=bias)
        nn.init.xavier_uniform_(self.proj.weight)
        if bias:
            nn.init.zeros_(self.proj.bias)

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, P / factor^2, D]."""
        out: Tensor = self.proj(join_patches(features, self.factor))
        return out

    def num_tokens(self, num_patches: int) -> int:
        """Tokens out for tokens in; see ``joined_tokens``."""
        return joined_tokens(num_patches, self.factor)
