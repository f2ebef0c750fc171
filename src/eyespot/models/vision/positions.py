"""Where a patch is, behind encoders whose features do not say."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def with_positions(features: Tensor, frequencies: int) -> Tensor:
    """Features with sines and cosines of their place beside them: float [N, P, E] -> [N, P, E + 4 * frequencies].

    Across and down, the place in [0, 1] is seen in waves of 1/2, 1, 2, 4... to the picture. Source: arXiv 2003.08934,
    section 5.1, there for points in space. The patches are a square grid, row by row.

    Raises:
        ValueError: they are not.
    """
    if frequencies == 0:
        return features
    num_images, num_patches, _ = features.shape
    side = grid_side(num_patches)
    place = (torch.arange(side, device=features.device, dtype=torch.float32) + 0.5) / side
    angles = place.unsqueeze(1) * math.pi * 2.0 ** torch.arange(frequencies, device=features.device)  # [side, F]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, 2F]
    across, down = (waves.view(shape).expand(side, side, -1) for shape in ((1, side, -1), (side, 1, -1)))
    places = torch.cat([across, down], dim=-1).reshape(1, num_patches, -1).to(features.dtype)
    return torch.cat([features, places.expand(num_images, -1, -1)], dim=-1)


def grid_side(num_tokens: int) -> int:
    """Tokens in a row of a square grid.

    Raises:
        ValueError: so many are no square grid.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"{num_tokens} tokens of a picture are no square grid, so they have no place in it; leave out the CLS "
            "token (vision.keep_cls=false), or do without positions, conv and stages of kind detect"
        )
    return side
