"""A fixed number of learned queries that read the patches: the Perceiver Resampler.

Source: Alayrac et al., "Flamingo", arXiv 2204.14198, section 2.1 and figure 5, as Idefics (arXiv 2306.16527) writes it:
no biases but those of the norms, and ReLU where Flamingo squares it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_STD = 0.02  # of the queries as in the Perceiver (arXiv 2103.03206), and of every matrix


class PerceiverAttention(nn.Module):
    """Queries look at the patches and at each other, both normalised first."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.context_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return split.transpose(1, 2)  # [N, L, heads * head_dim] -> [N, heads, L, head_dim]

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """queries float [N, K, E], context float [N, P, E] -> float [N, K, E]."""
        queries = self.query_norm(queries)
        seen = torch.cat([self.context_norm(context), queries], dim=1)  # [N, P + K, E]
        q, k, v = self._heads(self.q_proj(queries)), self._heads(self.k_proj(seen)), self._heads(self.v_proj(seen))
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class PerceiverLayer(nn.Module):
    """Attention and feed-forward, each added to the queries."""

    def __init__(self, width: int, heads: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(mlp_ratio * width)
        self.attention = PerceiverAttention(width, heads, head_dim)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """queries float [N, K, E], context float [N, P, E] -> float [N, K, E]."""
        queries = queries + self.attention(queries, context)
        out: Tensor = queries + self.down_proj(F.relu(self.up_proj(self.mlp_norm(queries))))
        return out


class PerceiverConnector(nn.Module):
    """[N, P, E] -> [N, K, D]: K learned queries of width E read the patches, then one linear layer to width D.

    The default sizes are Flamingo's. Parameters, with A = heads * head_dim and I = mlp_ratio * E:
    `K*E + depth*(4*E*A + 2*E*I + 6*E) + 2*E + E*D + D`.

    Args:
        vision_dim: E. language_dim: D.
        num_queries: K, tokens for each picture, however many patches it has.
        depth: number of layers.
        heads, head_dim: of the attention; their product need not be E.
        mlp_ratio: inner width of the feed-forwards over E.
    """

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        *,
        num_queries: int = 64,
        depth: int = 6,
        heads: int = 16,
        head_dim: int = 96,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        sizes = {"num_queries": num_queries, "depth": depth, "heads": heads, "head_dim": head_dim}
        for name, value in {**sizes, "mlp_ratio * vision_dim": int(mlp_ratio * vision_dim)}.items():
            if value < 1:
                raise ValueError(f"perceiver {name} is {value}; at least 1 is needed")
        self.queries = nn.Parameter(torch.empty(num_queries, vision_dim))
        self.layers = nn.ModuleList(PerceiverLayer(vision_dim, heads, head_dim, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(vision_dim)
        self.proj = nn.Linear(vision_dim, language_dim)
        nn.init.trunc_normal_(self.queries, std=INITIAL_STD)
        self.apply(_initialise)

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, K, D]."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)  # [N, K, E]
        out: Tensor = self.proj(self.norm(queries))
        return out

    def num_tokens(self, num_patches: int) -> int:
        """K, for any number of patches."""
        return self.queries.shape[0]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
