"""What goes wrong while a model learns, said in words: it does not use the picture, explodes, or repeats itself."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import lightning
import torch
from torch import Tensor

from eyespot.config import TrainerSettings
from eyespot.data.collate import Collator, Window, image_key
from eyespot.data.sample import Sample, blind
from eyespot.models.loss import causal_loss
from eyespot.models.vlm import VLM
from eyespot.training.callbacks import SAMPLE_TOKENS, Reporter, looking_at

MIN_PICTURES = 8  # an interval from fewer says nothing
ROWS = 16  # in one pass
CALM_STEPS, LOUD_STEPS = 20, 5


def repeats(text: str) -> bool:
    """Whether a text ends in the same words, up to eight, four times, or in the same letters of a word eight times.

    >>> repeats("it is red, it is red, it is red, it is red,")
    True
    >>> repeats("haaaaaaaa"), repeats("10000"), repeats("very, very red")
    (True, False, False)
    """
    said = "".join(f" {word}" for word in text.split())
    for length in range(1, len(said) // 4 + 1):
        unit = said[-length:]
        if unit.count(" ") <= 8 and said.endswith(unit * (4 if " " in unit else 8)):
            return True
    return False


def interval(values: Tensor) -> tuple[float, float]:
    """95% interval of the mean of float [n], by Student's t. Source of its quantile: Abramowitz and Stegun, 26.7.5."""
    mean, freedom = float(values.mean()), len(values) - 1
    half = (1.96 + 2.372 / freedom + 2.823 / freedom**2) * float(values.std()) / math.sqrt(len(values))
    return mean - half, mean + half


@dataclass
class Explosion:
    """Tells an explosion from noise: the last five losses are all above 1.5 times the mean of the best twenty in a row
    before plus 1 (nat), and above the greatest of those twenty. One bad batch is not five, and where batches differ
    much the greatest of twenty is high. Early steps are compared with the few before them, because most explosions
    come with the first steps at the full learning rate."""

    last: list[float] = field(default_factory=list)
    calm: float = math.inf
    highest: float = math.inf

    def hears(self, loss: float) -> bool | None:
        """Whether the loss explodes; None when the last steps do not agree."""
        self.last = [*self.last, loss][-CALM_STEPS - LOUD_STEPS :]
        earlier, now = self.last[:-LOUD_STEPS], self.last[-LOUD_STEPS:]
        if earlier and statistics.fmean(earlier) < self.calm:
            self.calm, self.highest = statistics.fmean(earlier), max(earlier)
        above = {value > max(1.5 * self.calm + 1, self.highest) for value in now}
        return above.pop() if len(above) == 1 else None


@dataclass(frozen=True)
class Look:
    """Loss per learned token of answers beside their own pictures, beside others, and without any: means over pictures;
    low and high are the 95% interval of what the own picture is worth, ``other - own``."""

    step: int
    own: float
    other: float
    blind: float
    low: float
    high: float
    pictures: int

    def __str__(self) -> str:
        return f"loss {self.own:.3f} with its picture, {self.other:.3f} with another, {self.blind:.3f} without"


class Sight:
    """A few answers, scored beside their own pictures, each other's, and none. What counts is the difference to each
    other's: without any, a model also lacks tokens that it is used to.

    Args:
        samples: some are drawn that have no picture in common, so that they count as independent.
        collator: of the run. limit: so many samples at most.
    """

    def __init__(self, samples: Sequence[Sample], collator: Collator, limit: int) -> None:
        self.collator = collator
        self.samples: list[Sample] = []
        seen: set[Hashable] = set()
        for sample in random.Random(0).sample(samples, len(samples)):
            pictures = set(image_key(sample))
            fits = 0 < len(sample.images) <= MIN_PICTURES // 2 and not pictures & seen
            if len(self.samples) < limit and fits and all(self._window([s]).ids for s in (sample, blind(sample))):
                self.samples.append(sample)
                seen |= pictures

    def _window(self, samples: Sequence[Sample]) -> Window:
        """A row for each sample that can be used."""
        run, num_batches = self.collator, -(-len(samples) // ROWS)
        return Collator(run.processor, num_batches, run.max_length, None, run.features)([[s] for s in samples])

    @cached_property
    def sides(self) -> list[list[dict[str, Tensor]]]:
        """Batches with the own pictures, with others and with none; kept, because every look reads the same."""
        own, without = self._window(self.samples), self._window([blind(sample) for sample in self.samples])
        key = "pixel_values" if self.collator.features is None else "image_features"
        pictures = [batch[key] for batch in own.batches]
        # a place gets what stood so many places before it, which is another sample's
        shift = max(len(sample.images) for sample in self.samples)
        others = torch.cat(pictures).roll(shift, 0).split([len(part) for part in pictures])
        exchanged = [{**batch, key: part} for batch, part in zip(own.batches, others, strict=True)]
        return [own.batches, exchanged, without.batches]

    def look(self, model: VLM, step: int) -> Look:
        """Scores of a model that is in evaluation mode."""
        own, other, without = (torch.cat([row_losses(model, batch) for batch in side]) for side in self.sides)
        low, high = interval(other - own)
        return Look(step, float(own.mean()), float(other.mean()), float(without.mean()), low, high, len(own))


@torch.no_grad()
def row_losses(model: VLM, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the learned tokens of each row: float64 [B]; the batch has one sample in each."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = inputs.pop("labels")
    hidden = model(**inputs, use_cache=False, skip_logits=True).last_hidden_state  # [B, T, D]
    losses = [causal_loss(model.language, hidden[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
    return torch.stack(losses).double().cpu()


class Lookout(lightning.Callback):
    """Warns when the model does not use the picture, its loss explodes or its answers repeat themselves, with a cure;
    again only after it had stopped. A loss that is not finite ends the run (see VLMModule).

    Args:
        settings: the trainer's. num_steps: of the whole run; in its first third nobody need look or stop.
        reporter: has the console, and is told what is no training time.
        sight: used every ``settings.sight_every`` steps and after the last; None never looks.
        tokenizer: of the answers that ``hear`` gets.
    """

    def __init__(
        self, settings: TrainerSettings, num_steps: int, reporter: Reporter, sight: Sight | None, tokenizer: Any
    ) -> None:
        self.settings, self.num_steps, self.reporter = settings, num_steps, reporter
        self.sight, self.tokenizer, self.explosion = sight, tokenizer, Explosion()
        self.looks: list[dict[str, Any]] = []
        self.warnings: list[dict[str, Any]] = []
        self._going_on: set[str] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, metrics = trainer.global_step, pl_module.step_metrics
        if (explodes := self.explosion.hears(metrics["train/loss"])) is not None:
            self._note("explosion", step, self._about_loss(metrics) if explodes else None)
        if self.sight is not None and (step % self.settings.sight_every == 0 or step == self.num_steps):
            with self.reporter.paused(), pl_module.whole_weights():
                if trainer.is_global_zero:
                    self._look(self.sight, trainer, pl_module.model)

    def _look(self, sight: Sight, trainer: Any, model: VLM) -> None:
        with looking_at(model), trainer.precision_plugin.forward_context():
            look = sight.look(model, trainer.global_step)
        self.looks.append(asdict(look))
        self.reporter.console.print(f"step {look.step}: {look}")
        for logger in trainer.loggers:
            logger.log_metrics({"sight/own": look.own, "sight/other": look.other, "sight/blind": look.blind}, look.step)
        if look.low > 0:
            self._note("sight", look.step, None)
        elif len(self.looks) > 1 and look.step >= self.num_steps / 3:
            learns = any(parameter.requires_grad for parameter in model.connector.parameters())
            cure = f"raise trainer.lr.connector ({self.settings.lr.connector})" if learns else "unfreeze the connector"
            text = f"no sign that the model uses the picture: {look}, so its own is worth {look.low:.3f} to "
            text += f"{look.high:.3f} (95% interval, {look.pictures} pictures); {cure}, see whether words alone tell "
            text += "the answers (`eyespot inspect data`), train longer, or raise trainer.sight_limit"
            self._note("sight", look.step, text)

    def hear(self, step: int, samples: Sequence[Sample], answers: Sequence[str]) -> None:
        """Answers to samples, of at most SAMPLE_TOKENS tokens, which a cut one still has nearly when read again."""
        sizes = [len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
        bad = (
            f"an answer repeats itself: {sample.id}: {answer!r}; see that the end of an answer is learned (green in "
            "`eyespot inspect data`), train longer, or ask with repetition_penalty=1.1"
            for sample, answer, size in zip(samples, answers, sizes, strict=True)
            if size >= 0.8 * SAMPLE_TOKENS and repeats(answer) and not any(map(repeats, sample.answers))
        )
        if step >= self.num_steps / 3:
            self._note("repetition", step, next(bad, None))

    def _about_loss(self, metrics: dict[str, float]) -> str:
        rates = ", ".join(f"{name[3:]} {rate:.3g}" for name, rate in metrics.items() if name.startswith("lr/"))
        now, best = statistics.median(self.explosion.last[-LOUD_STEPS:]), self.explosion.calm
        warmup, clip, norm = self.settings.warmup_share, self.settings.clip, metrics["train/grad_norm"]
        return (
            f"the loss exploded: {now:.3g}, at its best {best:.3g}; lower trainer.lr (now {rates}), warm up longer "
            f"(trainer.warmup_share={warmup}), or clip gradients lower (trainer.clip={clip}, their norm was {norm:.3g})"
        )

    def _note(self, kind: str, step: int, text: str | None) -> None:
        """Say what is wrong, unless it has been since it was said; None: nothing is."""
        if text is None:
            self._going_on.discard(kind)
        elif kind not in self._going_on:
            self._going_on.add(kind)
            self.warnings.append({"step": step, "kind": kind, "text": text})
            self.reporter.console.print(f"warning: {text}", style="yellow", markup=False)

    def state_dict(self) -> dict[str, Any]:
        going_on, explosion = sorted(self._going_on), asdict(self.explosion)
        return {"looks": self.looks, "warnings": self.warnings, "going on": going_on, "explosion": explosion}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.looks, self.warnings = list(state_dict["looks"]), list(state_dict["warnings"])
        self._going_on, self.explosion = set(state_dict["going on"]), Explosion(**state_dict["explosion"])
