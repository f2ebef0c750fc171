"""Which token comes next in one answer, whatever other answers grow beside it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; a seed makes the others repeat."""

    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, just as the model says it."""
        return self.temperature == self.presence_penalty == self.frequency_penalty == 0


class Sampler:
    """The choices of one answer, with random numbers of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()  # on the CPU, so that a seed means the same on every device
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.counts: Counter[int] = Counter()

    def choose(self, logits: Tensor) -> int:
        """The next token from logits float [V], which stay as they are."""
        logits = self._penalised(logits.detach().to("cpu", torch.float64))
        token = int(logits.argmax()) if self.sampling.temperature == 0 else self._draw(logits)
        self.counts[token] += 1
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        """Less for each token that the answer has already.

        Source: https://platform.openai.com/docs/guides/text-generation (frequency and presence penalties)
        """
        if not self.counts or self.sampling.presence_penalty == self.sampling.frequency_penalty == 0:
            return logits
        said, times = (torch.tensor(list(column)) for column in (self.counts.keys(), self.counts.values()))
        logits = logits.clone()
        logits[said] -= self.sampling.presence_penalty + self.sampling.frequency_penalty * times
        return logits

    def _draw(self, logits: Tensor) -> int:
        """A token by chance, among the likeliest that make up top_p together (nucleus sampling, arXiv 1904.09751)."""
        probabilities = ((logits - logits.max()) / self.sampling.temperature).softmax(-1)
        order = None
        if self.sampling.top_p < 1:
            probabilities, order = probabilities.sort(descending=True, stable=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.sampling.top_p, 0)
        up_to = probabilities.cumsum(-1)
        point = torch.rand((), generator=self.generator, dtype=torch.float64) * up_to[-1]
        place = torch.searchsorted(up_to, point, right=True).clamp(max=len(up_to) - 1)
        return int(place if order is None else order[place])


def log_probabilities(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of a token, and the likeliest tokens with theirs, as the model says it before any setting.

    Args:
        logits: float [V]. top: how many of the likeliest.
    """
    log_probs = logits.float().log_softmax(-1)
    best = log_probs.topk(top)
    return float(log_probs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
