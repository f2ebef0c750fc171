"""What happens beside the step: progress, curves, sample answers, checkpoints, and an orderly stop."""

from __future__ import annotations

import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eyespot.data.collate import Window
from eyespot.data.sample import Rejected, Sample
from eyespot.inference import Assistant
from eyespot.training.checkpoint import CheckpointWriter, random_state, set_random_state
from eyespot.training.processes import from_all

STOP_SIGNALS = [signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGUSR1") if n in signal.Signals.__members__]
SAMPLE_TOKENS = 24  # of a sample answer
SAME_SIGNAL_S = 2.0  # torchrun passes on a Ctrl+C that the terminal has sent to every process already


class Reporter(lightning.Callback):
    """Progress on the terminal, metrics to the loggers, and the curve kept for the report.

    Metrics: train/loss, train/grad_norm, lr per part, samples_per_s, tokens_per_s (text and image tokens, no padding).
    """

    def __init__(self, log_every: int, console: Console) -> None:
        self.log_every, self.console = log_every, console
        self.curve: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.measured: dict[str, float] = {}  # by the last validation
        self.rejected: list[Rejected] = []
        self.samples_seen = 0
        self.seconds = 0.0
        self._since = (time.perf_counter(), 0, 0)
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._task = self._progress.add_task("", total=pl_module.num_steps, completed=trainer.global_step, words="")
        self._progress.start()
        self._since = (time.perf_counter(), 0, 0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Window, batch_idx: int) -> None:
        then, samples, tokens = self._since
        new_samples, new_tokens = pl_module.step_counts
        self._since = (then, samples + new_samples, tokens + new_tokens)
        self.samples_seen += new_samples
        for sample in batch.rejected:
            self.rejected.append(sample)
            self.console.print(f"left out {sample.id}: {sample.reason}", markup=False)
        step, loss = trainer.global_step, pl_module.step_metrics["train/loss"]
        self.curve.append((step, loss))
        self._progress.update(self._task, completed=step, words=f"loss {loss:.4f}")
        if step % self.log_every == 0 or step == pl_module.num_steps:
            self._report(trainer, pl_module, step)

    def _report(self, trainer: Any, pl_module: Any, step: int) -> None:
        then, samples, tokens = self._since
        now = time.perf_counter()
        self.seconds += now - then
        rates = {"samples_per_s": samples / (now - then), "tokens_per_s": tokens / (now - then)}
        for logger in trainer.loggers:
            logger.log_metrics({**pl_module.step_metrics, **rates}, step=step)
        if not self.console.is_terminal:
            recent = [loss for _, loss in self.curve[-self.log_every :]]
            self.console.print(
                f"step {step}/{pl_module.num_steps}  loss {sum(recent) / len(recent):.4f}  "
                f"{rates['samples_per_s']:.1f} samples/s"
            )
        self._since = (now, 0, 0)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._paused = time.perf_counter()

    def _go_on(self) -> None:
        then, samples, tokens = self._since
        self._since = (then + time.perf_counter() - self._paused, samples, tokens)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training, and its time does not count."""
        self._paused = time.perf_counter()
        yield
        self._go_on()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._go_on()
        if trainer.sanity_checking or "val/loss" not in trainer.callback_metrics:
            return
        metrics = trainer.callback_metrics.items()
        found = {name.removeprefix("val/"): float(value) for name, value in metrics if name.startswith("val/")}
        loss = found.pop("loss")
        self.validation.append((trainer.global_step, loss))
        self.measured = found
        others = "".join(f", {name} {value:.4f}" for name, value in found.items())
        self.console.print(f"step {trainer.global_step}: validation loss {loss:.4f}{others}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._progress.stop()

    def state_dict(self) -> dict[str, Any]:
        return {
            "curve": self.curve, "validation": self.validation, "measured": self.measured, "seconds": self.seconds,
            "seen": self.samples_seen,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = [(int(s), float(v)) for s, v in state_dict["curve"]]
        self.validation = [(int(s), float(v)) for s, v in state_dict["validation"]]
        self.measured = dict(state_dict["measured"])
        self.seconds, self.samples_seen = state_dict["seconds"], state_dict["seen"]


@contextmanager
def looking_at(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; behind it nothing has changed what training will do."""
    state, was_training = random_state(), model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        set_random_state(state)


class SampleAnswers(lightning.Callback):
    """A few fixed questions asked every ``every`` steps, printed, appended to samples.jsonl, and told to ``hear``."""

    def __init__(
        self,
        samples: Sequence[Sample],
        assistant: Assistant,
        every: int,
        file: Path,
        console: Console,
        hear: Callable[[int, Sequence[Sample], Sequence[str]], None],
    ) -> None:
        self.samples, self.assistant, self.every = samples, assistant, every
        self.file, self.console, self.hear = file, console, hear

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.samples or trainer.global_step % self.every:
            return
        with pl_module.whole_weights():
            if trainer.is_global_zero:
                self._ask(trainer.global_step)

    def _ask(self, step: int) -> None:
        asked = [(sample.images, question_of(sample)) for sample in self.samples]
        self.assistant.forget()
        with looking_at(self.assistant.model):
            answers = self.assistant.answer_batch(asked, max_new_tokens=SAMPLE_TOKENS)
        with self.file.open("a", encoding="utf-8") as file:
            for sample, answer in zip(self.samples, answers, strict=True):
                row = {"step": step, "id": sample.id, "answer": answer, "truth": list(sample.answers)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.console.print(f"  {sample.id}: {answer!r} (truth: {', '.join(sample.answers)})", markup=False)
        self.hear(step, self.samples, answers)


def question_of(sample: Sample) -> list[Any]:
    """The conversation of a sample up to the answer that is asked for: everything before its last turn."""
    return list(sample.messages[:-1])


class Checkpoints(lightning.Callback):
    """Writes a checkpoint every ``every`` steps, at the end of a validation that is among the best, and when asked to
    stop; keeps the ``keep_best`` best and the last.

    A first Ctrl+C (or SIGTERM, or SIGUSR1, with which SLURM likes to announce the end of a job) finishes the step,
    writes a checkpoint and ends the run, in all processes though only one may have got it; a second one ends it at
    once.
    """

    def __init__(self, writer: CheckpointWriter, every: int, keep_best: int, patience: int | None) -> None:
        self.writer, self.every, self.keep_best, self.patience = writer, every, keep_best, patience
        self.scores: dict[str, float] = {}
        self.stopped_by: str | None = None
        self.bad_validations = 0
        self._resumed: list[dict[str, Any]] = []
        self._asked_at = math.inf

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank < len(self._resumed):
            set_random_state(self._resumed[trainer.global_rank])
        elif trainer.global_rank > 0:
            torch.manual_seed(pl_module.settings.seed + trainer.global_rank)  # dropout of its own
        for number in STOP_SIGNALS:  # behind the training Lightning sets all signals back to what they were before it
            signal.signal(number, functools.partial(self._ask_to_stop, trainer, pl_module))

    def _ask_to_stop(self, trainer: Any, pl_module: Any, number: int, frame: Any) -> None:
        if pl_module.stop_signal and time.monotonic() > self._asked_at + SAME_SIGNAL_S:
            raise KeyboardInterrupt
        if not pl_module.stop_signal and trainer.is_global_zero:
            print("\nfinishing this step and saving; press Ctrl+C again to stop at once", file=sys.stderr)
        self._asked_at = min(self._asked_at, time.monotonic())
        pl_module.stop_signal = number

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # alone, a process need not wait for the next step to agree with the others
        number = pl_module.stop_signal if trainer.world_size == 1 else pl_module.agreed_signal
        if number and trainer.global_step < pl_module.num_steps:  # after the last step nothing is left to stop
            self.stopped_by = signal.Signals(number).name
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # whoever stops a run does not want to wait for a validation
        if self.stopped_by is not None or trainer.global_step % self.every == 0:
            self.save(trainer, pl_module)
        if trainer.global_step == pl_module.num_steps:
            trainer.should_stop = True  # Lightning then validates once more, if this step is not a turn for it anyway

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or "val/loss" not in trainer.callback_metrics:
            return
        score = float(trainer.callback_metrics["val/loss"])
        best = sorted(self.scores.values())
        self.bad_validations = 0 if not best or score < best[0] else self.bad_validations + 1
        if len(best) < self.keep_best or score < best[self.keep_best - 1]:
            self.scores[self.name_of(trainer.global_step)] = score
            self.save(trainer, pl_module)
        if self.patience is not None and self.bad_validations >= self.patience:
            trainer.should_stop = True

    @staticmethod
    def name_of(step: int) -> str:
        return f"step-{step:07d}"

    def save(self, trainer: Any, pl_module: Any) -> None:
        """Write the checkpoint of the current step and delete those that are neither last nor among the best."""
        last = self.writer.write(trainer.global_step, trainer)
        pl_module.last_good = str(last)
        best = sorted(self.scores, key=lambda name: self.scores[name])[: self.keep_best]
        self.scores = {name: self.scores[name] for name in best}
        if trainer.is_global_zero:
            self.writer.keep_only({last, *(self.writer.folder / name for name in best)})

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "bad": self.bad_validations, "random": from_all(random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores, self.bad_validations = dict(state_dict["scores"]), state_dict["bad"]
        self._resumed = state_dict["random"]
