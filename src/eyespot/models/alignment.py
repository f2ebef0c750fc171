"""Pictures and texts in one space: the losses that compare them, and the head with which a model takes part.

Every loss is the sum over the rows that are here, against all rows of the global batch, so that processes add up.

Shape letters: n rows here, m rows of the whole batch, Q vectors for each picture, d width of the shared space, W width
of what is projected into it, S states for each pair.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_TEMPERATURE = 0.07  # arXiv 2103.00020, section 2.5
MAX_SCALE = 100.0  # the same place: logits are never multiplied by more
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # arXiv 2303.15343, section 3.2


class Alignment(nn.Module):
    """Two projections into one space, temperatures, and a head that says whether a text is about a picture.

    Args:
        width: W. dim: d.
    """

    def __init__(self, width: int, *, dim: int = 256) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"alignment dim is {dim}; at least 1 is needed")
        self.image_proj = nn.Linear(width, dim)
        self.text_proj = nn.Linear(width, dim)
        self.match = nn.Linear(width, 2)
        for layer in (self.image_proj, self.text_proj, self.match):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))
        self.sigmoid_log_scale = nn.Parameter(torch.tensor(math.log(SIGMOID_SCALE)))
        self.sigmoid_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))

    def image_vectors(self, states: Tensor) -> Tensor:
        """float [n, Q, W] -> unit vectors float32 [n, Q, d]."""
        return F.normalize(self.image_proj(self._in_own_dtype(states)).float(), dim=-1)

    def text_vectors(self, states: Tensor) -> Tensor:
        """float [n, W] -> unit vectors float32 [n, d]."""
        return F.normalize(self.text_proj(self._in_own_dtype(states)).float(), dim=-1)

    def match_logits(self, states: Tensor) -> Tensor:
        """float [n, S, W] -> scores of "no match" and "match", float32 [n, 2]: of every state, averaged.

        Source: arXiv 2301.12597, section 3.1.
        """
        logits: Tensor = self.match(self._in_own_dtype(states)).float().mean(dim=1)
        return logits

    def _in_own_dtype(self, states: Tensor) -> Tensor:
        return states.to(self.match.weight.dtype)  # the head is float32, what it reads may be bfloat16

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Keep the learned scales at most at ``MAX_SCALE``; the next gradient may lower them again."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))
        self.sigmoid_log_scale.clamp_(max=math.log(MAX_SCALE))


def build_alignment(settings: dict[str, Any] | None, connector: nn.Module, language_dim: int) -> Alignment | None:
    """The head of ``VLMConfig.alignment``, or None: over a connector's text side if it has one, else over the language
    model."""
    if settings is None:
        return None
    has_text_side = getattr(connector, "text", None) is not None
    width = int(connector.hidden_dim) if has_text_side else language_dim  # type: ignore[arg-type]
    return Alignment(width, dim=settings["dim"])


def similarity(image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
    """Cosine of the vector of each picture that is closest to the text (arXiv 2301.12597, section 3.1).

    float [n, Q, d], float [m, d] -> float [n, m].
    """
    with torch.autocast(image_vectors.device.type, enabled=False):  # bfloat16 would blur what the scale then magnifies
        return torch.einsum("nqd,md->nqm", image_vectors, text_vectors).amax(dim=1)


def same_pairs(image_keys: Tensor, text_keys: Tensor, all_image_keys: Tensor, all_text_keys: Tensor) -> Tensor:
    """Which rows belong together: those about the same picture, and those that say the same.

    int64 [n], [n], [m], [m] -> bool [n, m].
    """
    return (image_keys.unsqueeze(1) == all_image_keys) | (text_keys.unsqueeze(1) == all_text_keys)


def softmax_contrastive(logits: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss in one direction, summed over rows; all that belongs to a row is an equally right answer.

    Source: arXiv 2103.00020, figure 3; several right answers as in ALBEF's code for retrieval
    (https://github.com/salesforce/ALBEF, arXiv 2107.07651).

    Args:
        logits: float [n, m], scaled similarities. same: bool [n, m], at least one True in each row.
    """
    targets = same.float() / same.sum(dim=1, keepdim=True)
    return -(targets * logits.log_softmax(dim=1)).sum()


def sigmoid_contrastive(logits: Tensor, same: Tensor) -> Tensor:
    """SigLIP's loss, summed over pairs: each is asked alone whether it belongs together.

    Source: arXiv 2303.15343, equation 1 (there divided by the number of rows).

    Args:
        logits: float [n, m], similarities with scale and bias. same: bool [n, m].
    """
    signs = same.float() * 2 - 1
    return -F.logsigmoid(signs * logits).sum()


def sample_negatives(logits: Tensor, same: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """For each row one that does not belong to it, the more similar the more likely.

    Source: arXiv 2107.07651, section 3.2 (hard negatives in proportion to the contrastive similarity).

    Args:
        logits: float [n, m], scaled similarities. same: bool [n, m], what must not be drawn.
        draws: float [n], one number in [0, 1) for each row; nothing else is random.

    Returns:
        Indices int64 [n] into the m rows, and bool [n]: whether there was anything to draw.
    """
    # float64, or the end of the draw could fall behind the last row that is allowed; not every device has it
    masked = logits.detach().double().cpu().masked_fill(same.cpu(), -math.inf)
    sums = masked.softmax(dim=1).nan_to_num(0.0).cumsum(dim=1)
    places = torch.searchsorted(sums, draws.double().cpu().unsqueeze(1) * sums[:, -1:], right=True).squeeze(1)
    return places.clamp(max=same.shape[1] - 1).to(same.device), ~same.all(dim=1)
