"""Work over many pictures on many machines, with Ray Data: captions, evaluations, the feature cache.

What goes to a worker is a whole batch, the same that a single process would make, so every answer is computed in the
same company and comes out the same. Workers get paths, not contents: all machines need the model, the pictures and
EYESPOT_CACHE under the same names. A worker that dies is started again, and its batch is done again.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from eyespot.config import TrainSettings
from eyespot.data import features
from eyespot.data.sample import ImageSource, Sample
from eyespot.devices import choose_device
from eyespot.evaluation.asking import Journal, ReadOnlyJournal
from eyespot.evaluation.caption import caption_batch, write_captions
from eyespot.evaluation.results import Evaluation
from eyespot.evaluation.runner import evaluate
from eyespot.files import default_cache
from eyespot.inference import Answer, AnswerScore, Assistant, load
from eyespot.training.run import feature_store, to_be_encoded, untrained

OBJECT_STORE_BYTES = 200_000_000  # of a Ray that is started here; what does not fit goes to the disk
ENCODED_AT_ONCE = 32
PICTURES_IN_A_JOB = 8 * ENCODED_AT_ONCE
NUM_RESTARTS = 2


@contextmanager
def workers(num_workers: int) -> Iterator[Any]:
    """Ray, connected to the cluster of RAY_ADDRESS, or started here with so many processors.

    Raises:
        ImportError: Ray is not installed.
        ValueError: fewer than 1 worker.
    """
    if num_workers < 1:
        raise ValueError(f"--ray is {num_workers}; it must be at least 1 worker")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('--ray needs Ray; pip install "eyespot[ray]"') from error
    mine = not ray.is_initialized()
    if mine:
        here: dict[str, Any] = {"address": "local", "num_cpus": num_workers, "include_dashboard": False,
                                "object_store_memory": OBJECT_STORE_BYTES}  # fmt: skip
        place = {} if os.environ.get("RAY_ADDRESS") else here
        ray.init(**place, logging_level=logging.ERROR, log_to_driver=False)  # errors come back as results
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


class _Actor:
    """A worker as Ray Data wants it: from rows to rows. An error is a result, which Ray would bury in its own."""

    def __init__(self, worker: Callable[..., Any], arguments: tuple[Any, ...], cache: str) -> None:
        os.environ["EYESPOT_CACHE"] = cache
        self.worker, self.arguments = worker, arguments
        self.work: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            self.work = self.work or self.worker(*self.arguments)
            return {"result": pickle.dumps(self.work(pickle.loads(row["job"]))), "error": ""}
        except Exception as error:
            return {"result": b"", "error": f"{type(error).__name__}: {error}"}


def over_workers(
    jobs: Iterable[Any],
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    num_workers: int,
    device: str = "cpu",
) -> Generator[Any]:
    """``worker(*arguments)(job)`` for every job, in the order of the jobs, as the results come.

    Args:
        worker: made once in each of the processes, and then given one job after the other.
        device: a worker for CUDA gets a GPU of its own.

    Raises:
        ValueError: a job failed, or ended its worker several times; the message says why.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and choose_device().type == "cuda")
    with workers(num_workers) as ray:
        rows = [{"job": pickle.dumps(job)} for job in jobs]
        results = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map(
            _Actor,
            fn_constructor_args=(worker, arguments, str(default_cache().absolute())),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=1,
            num_gpus=int(on_gpu),
            max_restarts=NUM_RESTARTS,
            max_task_retries=NUM_RESTARTS,
        )
        try:
            for row in results.iter_rows():
                if row["error"]:
                    raise ValueError(f"a worker failed: {row['error']}")
                yield pickle.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise ValueError(
                f"a worker was ended {NUM_RESTARTS + 1} times, perhaps for want of memory; lower the batch size or N "
                f"({str(error).strip().splitlines()[0]})"
            ) from error


# --- evaluate -----------------------------------------------------------------------------------------------------


class Answering:
    """What an assistant's method gives for its arguments."""

    def __init__(self, *model: Any) -> None:
        self.assistant = load(*model)
        self._folded = ExitStack()  # for as long as the worker lives
        self._folded.enter_context(self.assistant.folded())

    def __call__(self, job: tuple[str, tuple[Any, ...]]) -> list[Any]:
        method, arguments = job
        answers: list[Any] = getattr(self.assistant, method)(*arguments)
        return answers


class _Recorder:
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, tuple[Any, ...]]] = []

    def answer_scored(self, conversations: Sequence[Any], max_new_tokens: int) -> list[Answer]:
        self.jobs.append(("answer_scored", (conversations, max_new_tokens)))
        return [Answer("", 0.0) for _ in conversations]

    def score_answers(self, conversations: Sequence[Any]) -> list[AnswerScore]:
        self.jobs.append(("score_answers", (conversations,)))
        return [AnswerScore(0.0, False) for _ in conversations]


class _Replay:
    """Gives answers that are made elsewhere, in the order in which they will be asked for."""

    def __init__(self, answers: Iterator[list[Any]]) -> None:
        self.answers = answers

    def answer_scored(self, conversations: Sequence[Any], max_new_tokens: int) -> list[Answer]:
        return next(self.answers)

    def score_answers(self, conversations: Sequence[Any]) -> list[AnswerScore]:
        return next(self.answers)


def evaluate_with_ray(
    model: tuple[Any, ...], samples: Sequence[Sample], num_workers: int, journal: Journal | None = None, **options: Any
) -> Evaluation:
    """``evaluate`` with the answers of many workers; which questions are asked does not depend on any answer.

    Args:
        model: arguments of ``eyespot.load``, at least folder and device. journal, options: of ``evaluate``.
    """
    recorder = _Recorder()
    known = None if journal is None else ReadOnlyJournal(journal)
    evaluate(recorder, samples, journal=known, **{**options, "progress": False})
    with closing(over_workers(recorder.jobs, Answering, model, num_workers=num_workers, device=model[1])) as answers:
        return evaluate(_Replay(answers), samples, journal=journal, **options)


# --- caption ------------------------------------------------------------------------------------------------------


class Captioning:
    """Lines for a batch of pictures."""

    def __init__(self, model: tuple[Any, ...], folder: Path, prompt: str, generation: dict[str, Any]) -> None:
        self.describe = partial(caption_batch, load(*model), folder, prompt=prompt, generation=generation)

    def __call__(self, paths: list[Path]) -> list[dict[str, str]]:
        return self.describe(paths=paths)


def caption_with_ray(
    model: tuple[Any, ...], folder: Path, out: Path, num_workers: int, *, prompt: str = "", batch_size: int = 16,
    **generation: Any,
) -> tuple[int, int]:  # fmt: skip
    """``caption_folder`` with many workers.

    Raises:
        ValueError: as ``caption_folder``, or a temperature: what is drawn would depend on who draws it.
    """
    if generation.get("temperature"):
        raise ValueError(f"temperature is {generation['temperature']}; with --ray captions are greedy, so leave it out")

    def describe(batches: Sequence[list[Path]]) -> Iterator[list[dict[str, str]]]:
        arguments = (model, folder, prompt, generation)
        return over_workers(batches, Captioning, arguments, num_workers=num_workers, device=model[1])

    return write_captions(describe, folder, out, batch_size)


# --- cache fill ---------------------------------------------------------------------------------------------------


class Encoding:
    """Writes the features of some pictures to the cache."""

    def __init__(self, settings: TrainSettings, key: str) -> None:
        self.assistant: Assistant = untrained(settings)
        self.store, self.encode = feature_store(settings, self.assistant)
        if self.store.folder.name != key:
            raise ValueError(
                f"this machine would encode differently (key {self.store.folder.name} instead of {key}); all need the "
                "same weights, device and versions"
            )

    def __call__(self, pictures: list[ImageSource]) -> int:
        return features.fill(
            self.store, pictures, self.assistant.processor, self.encode, limit_bytes=float("inf"),
            batch_size=ENCODED_AT_ONCE,
        )  # fmt: skip


def fill_with_ray(settings: TrainSettings, num_workers: int, console: Console) -> int:
    """``fill_features`` with many workers, which write into the one cache; returns how many pictures were encoded.

    Raises:
        CacheFull: the features need more than the limit or the disk has; at most one batch was written.
        ConfigError: as ``fill_features``.
    """
    settings, pictures = to_be_encoded(settings, console)
    assistant = untrained(settings)
    store, encode = feature_store(settings, assistant)
    missing = [picture for _, picture in features.missing_from(store, pictures)]
    limit = settings.data.cache_gb * 1e9
    first, rest = missing[:ENCODED_AT_ONCE], missing[ENCODED_AT_ONCE:]
    done = features.fill(
        store, first, assistant.processor, encode, limit_bytes=limit, batch_size=ENCODED_AT_ONCE, console=console
    )
    if not rest:
        return done
    size = next((store[picture].nbytes for picture in first if picture in store), 0)
    features.make_room(store.folder, len(rest) * size, limit)
    jobs = [rest[start : start + PICTURES_IN_A_JOB] for start in range(0, len(rest), PICTURES_IN_A_JOB)]
    arguments = (settings, store.folder.name)
    device = settings.trainer.device
    encoded: Iterator[int] = over_workers(jobs, Encoding, arguments, num_workers=num_workers, device=device)
    return done + sum(encoded)
