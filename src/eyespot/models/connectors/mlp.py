"""The projector of most VLMs: linear layers with GELU between them."""

from __future__ import annotations

from torch import Tensor, nn


class MLPConnector(nn.Module):
    """[N, P, E] -> [N, P, D] through ``depth`` linear layers (LLaVA 1.5, arXiv 2310.03744, for depth 2).

    Args:
        vision_dim: E. language_dim: D.
        depth: number of linear layers, at least 1.
        hidden_dim: width between them; by default 2 x D.
        dropout: after each GELU.
        norm: a LayerNorm after each GELU.
        init: "xavier" (uniform weights, zero biases; Glorot & Bengio 2010) or "default" (PyTorch's own).
    """

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        *,
        depth: int = 2,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        norm: bool = False,
        init: str = "xavier",
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"mlp depth is {depth}; at least 1 linear layer is needed")
        if init not in ("xavier", "default"):
            raise ValueError(f"mlp init is {init!r}; choose xavier or default")
        hidden = 2 * language_dim if hidden_dim is None else hidden_dim
        if hidden < 1:
            raise ValueError(f"mlp hidden_dim is {hidden}; at least 1 is needed")
        widths = [vision_dim, *[hidden] * (depth - 1), language_dim]
        layers: list[nn.Module] = []
        for i in range(depth):
            if i > 0:
                layers += [nn.GELU(), *([nn.LayerNorm(widths[i])] if norm else []), nn.Dropout(dropout)]
            layers.append(nn.Linear(widths[i], widths[i + 1]))
        self.layers = nn.Sequential(*layers)
        if init == "xavier":
            self.apply(_xavier)

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, P, D]."""
        out: Tensor = self.layers(features)
        return out

    @staticmethod
    def num_tokens(num_patches: int) -> int:
        """Tokens out for tokens in."""
        return num_patches


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
