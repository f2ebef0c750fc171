"""The projector of most VLMs: linear layers with GELU between them."""

from __future__ import annotations

from torch import Tensor, nn

from eyespot.models.connectors.pixel_shuffle import join_patches, joined_tokens


class MLPConnector(nn.Module):
    """[N, P, E] -> [N, P / factor^2, D] through ``depth`` linear layers (LLaVA 1.5, arXiv 2310.03744, for depth 2).

    Args:
        vision_dim: E. language_dim: D.
        depth: number of linear layers, at least 1.
        hidden_dim: width between them; by default 2 x D.
        dropout: after each GELU.
        norm: a LayerNorm after each GELU.
        factor: so many patches to a side are joined into one token first (InternVL 1.5, arXiv 2404.16821, with 2).
        init: "xavier" (uniform weights, zero biases; Glorot & Bengio 2010) or "default" (PyTorch's own).
    """

    keeps_grid = True  # tokens are in the order of the patches

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        *,
        depth: int = 2,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        norm: bool = False,
        factor: int = 1,
        init: str = "xavier",
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"mlp depth is {depth}; at least 1 linear layer is needed")
        if factor < 1:
            raise ValueError(f"mlp factor is {factor}; at least 1 is needed")
        if init not in ("xavier", "default"):
            raise ValueError(f"mlp init is {init!r}; choose xavier or default")
        hidden = 2 * language_dim if hidden_dim is None else hidden_dim
        if hidden < 1:
            raise ValueError(f"mlp hidden_dim is {hidden}; at least 1 is needed")
        self.factor = factor
        widths = [vision_dim * factor**2, *[hidden] * (depth - 1), language_dim]
        layers: list[nn.Module] = []
        for i in range(depth):
            if i > 0:
                layers += [nn.GELU(), *([nn.LayerNorm(widths[i])] if norm else []), nn.Dropout(dropout)]
            layers.append(nn.Linear(widths[i], widths[i + 1]))
        self.layers = nn.Sequential(*layers)
        if init == "xavier":
            self.apply(_xavier)

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, P / factor^2, D]."""
        out: Tensor = self.layers(join_patches(features, self.factor))
        return out

    def num_tokens(self, num_patches: int) -> int:
        """Tokens out for tokens in; see ``joined_tokens``."""
        return joined_tokens(num_patches, self.factor)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
