"""One linear layer from vision width to language width."""

from __future__ import annotations

from torch import Tensor, nn


class LinearConnector(nn.Module):
    """[N, P, E] -> [N, P, D] (LLaVA 1, arXiv 2304.08485)."""

    keeps_grid = True  # tokens are in the order of the patches

    def __init__(self, vision_dim: int, language_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(vision_dim, language_dim, bias=bias)
        nn.init.xavier_uniform_(self.proj.weight)
        if bias:
            nn.init.zeros_(self.proj.bias)

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, P, D]."""
        out: Tensor = self.proj(features)
        return out

    @staticmethod
    def num_tokens(num_patches: int) -> int:
        """Tokens out for tokens in."""
        return num_patches
