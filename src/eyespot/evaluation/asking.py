"""Ask a model all questions of all conditions: every input once, in a good order, and never again after a crash."""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from string import ascii_uppercase
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from eyespot.data.features import picture_digest
from eyespot.data.sample import text_part
from eyespot.evaluation.controls import image_key, prompt_key

if TYPE_CHECKING:
    from eyespot.data.sample import Sample
    from eyespot.evaluation.benchmarks.base import By
    from eyespot.inference import Answer, AnswerScore
    from eyespot.processing.images import ImageInput
    from eyespot.processing.prompt import Message

Conversations = Sequence[tuple[Sequence["ImageInput"], Sequence["Message"]]]


class PlainAnswerer(Protocol):
    """All that evaluation needs of a model."""

    def answer_batch(self, conversations: Conversations, max_new_tokens: int) -> list[str]:
        """One greedy answer for each (images, messages); the messages end with a user turn."""
        ...


class ScoringAnswerer(Protocol):
    """A model that says how probable its answers are, and answers that it is given (see ``Assistant``)."""

    def answer_scored(self, conversations: Conversations, max_new_tokens: int) -> list[Answer]: ...
    def score_answers(self, conversations: Conversations) -> list[AnswerScore]: ...


Answerer = PlainAnswerer | ScoringAnswerer


class Said(NamedTuple):
    """An answer and its log-probability, if the model gives one."""

    text: str
    log_prob: float | None = None


class Journal:
    """Answers on disk, so that an evaluation goes on where it was stopped.

    Args:
        path: JSON lines; the first names what the answers belong to.
        identity: of the model and of all settings on which answers depend; a file of another one is begun anew.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))

    def read(self) -> dict[str, Said]:
        """Answers by key; empty if there is no file, or one of something else. A line cut off by a crash is dropped."""
        if not self.path.is_file():
            return {}
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if not rows or rows[0] != {"identity": self.identity}:
            return {}
        return {row["key"]: Said(row["text"], row["log_prob"]) for row in rows[1:]}

    @contextmanager
    def writing(self, known: Mapping[str, Said]) -> Iterator[IO[str]]:
        """The open file, which holds what is known; it is removed by ``close``, once the results are written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"identity": self.identity}) + "\n")
            for key, said in known.items():
                file.write(_line(key, said))
            file.flush()
            yield file

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


class ReadOnlyJournal(Journal):
    """Gives what another one knows, and keeps nothing."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(journal.path, journal.identity)

    @contextmanager
    def writing(self, known: Mapping[str, Said]) -> Iterator[IO[str]]:
        yield io.StringIO()


def _line(key: str, said: Said) -> str:
    return json.dumps({"key": key, "text": said.text, "log_prob": said.log_prob}, ensure_ascii=False) + "\n"


def ask_all(
    answerer: Answerer,
    conditions: Mapping[str, Sequence[Sample]],
    *,
    by: By,
    batch_size: int,
    max_new_tokens: int,
    progress: bool | None,
    journal: Journal | None,
) -> tuple[dict[str, list[Said]], int]:
    """Answers by condition in the order of its samples, and the number of distinct inputs that were asked now.

    Greedy answers are a function of the input, so equal ones are asked once, over all conditions.
    """
    asker = _Asker(answerer, by, batch_size, max_new_tokens)
    keys = {name: [_input_key(sample) for sample in samples] for name, samples in conditions.items()}
    with _bar(progress) as bar, asker.remembering(journal, keys, conditions):
        tasks = {name: bar.add_task(name, total=None, rate="") for name in conditions}
        for name, samples in conditions.items():
            new = {key: s for key, s in zip(keys[name], samples, strict=True) if key not in asker.known}
            asker.ask(new, bar, tasks[name])
    return {name: [asker.known[key] for key in of_condition] for name, of_condition in keys.items()}, asker.num_asked


class _Asker:
    def __init__(self, answerer: Answerer, by: By, batch_size: int, max_new_tokens: int) -> None:
        self.answerer, self.by = answerer, by
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.known: dict[Hashable, Said] = {}
        self.num_asked = 0
        self.file: IO[str] | None = None
        self.names: dict[Hashable, str] = {}

    def remembering(
        self,
        journal: Journal | None,
        keys: Mapping[str, Sequence[Hashable]],
        conditions: Mapping[str, Sequence[Sample]],
    ) -> AbstractContextManager[None]:
        """Take over what the journal knows, and write into it from here on."""
        return nullcontext() if journal is None else self._remembering(journal, keys, conditions)

    @contextmanager
    def _remembering(
        self,
        journal: Journal,
        keys: Mapping[str, Sequence[Hashable]],
        conditions: Mapping[str, Sequence[Sample]],
    ) -> Iterator[None]:
        for name, samples in conditions.items():
            for key, sample in zip(keys[name], samples, strict=True):
                if key not in self.names:
                    self.names[key] = _lasting_key(sample)
        known = journal.read()
        self.known = {key: known[name] for key, name in self.names.items() if name in known}
        with journal.writing({self.names[key]: said for key, said in self.known.items()}) as self.file:
            yield

    def ask(self, new: Mapping[Hashable, Sample], bar: Progress, task: TaskID) -> None:
        """Add the answer to each new input to the known ones."""
        bar.update(task, total=len(new))
        started = time.perf_counter()
        keys = _in_order(new)
        for start in range(0, len(keys), self.batch_size):
            batch = keys[start : start + self.batch_size]
            answers = self._answers([new[key] for key in batch])
            if len(answers) != len(batch):
                raise ValueError(
                    f"answer_batch got {len(batch)} conversations and gave {len(answers)} answers; one each"
                )
            for key, said in zip(batch, answers, strict=True):
                self.known[key] = said
                if self.file is not None:
                    self.file.write(_line(self.names[key], said))
            if self.file is not None:
                self.file.flush()
            self.num_asked += len(batch)
            rate = (start + len(batch)) / max(time.perf_counter() - started, 1e-9)
            bar.update(task, advance=len(batch), rate=f"{rate:.1f}/s")

    def _answers(self, samples: Sequence[Sample]) -> list[Said]:
        if self.by != "text":
            return self._chosen(samples)
        conversations = [(sample.images, sample.messages[:-1]) for sample in samples]
        if hasattr(self.answerer, "answer_scored"):
            return [Said(*answer) for answer in self.answerer.answer_scored(conversations, self.max_new_tokens)]
        return [Said(text) for text in self.answerer.answer_batch(conversations, self.max_new_tokens)]

    def _chosen(self, samples: Sequence[Sample]) -> list[Said]:
        """The likeliest option of each question, with its log-probability among them."""
        options = [
            sample.options if self.by == "option" else tuple(ascii_uppercase[: len(sample.options)])
            for sample in samples
        ]
        conversations = [
            (sample.images, [*sample.messages[:-1], {"role": "assistant", "content": [text_part(option)]}])
            for sample, texts in zip(samples, options, strict=True)
            for option in texts
        ]
        if not hasattr(self.answerer, "score_answers"):
            raise ValueError(f"{type(self.answerer).__name__} has no score_answers to compare options; ask by text")
        scores = iter(self.answerer.score_answers(conversations))
        chosen = []
        for texts in options:
            log_probs = [next(scores).log_prob for _ in texts]
            best = max(range(len(texts)), key=log_probs.__getitem__)
            total = math.log(sum(math.exp(value - log_probs[best]) for value in log_probs))
            chosen.append(Said(texts[best], -total))
        return chosen


def _input_key(sample: Sample) -> Hashable:
    return tuple(image_key(image) for image in sample.images), prompt_key(sample), sample.options


def _lasting_key(sample: Sample) -> str:
    """``_input_key`` for other processes: pictures by their content."""
    digest = hashlib.sha256()
    for piece in (*map(picture_digest, sample.images), prompt_key(sample).encode(), repr(sample.options).encode()):
        digest.update(len(piece).to_bytes(8) + piece)
    return digest.hexdigest()


def _in_order(new: Mapping[Hashable, Sample]) -> list[Hashable]:
    """Questions about one picture together, because they can share it, and the pictures with the longest ones first: a
    batch that does not fit into memory fails at once, and the time left is not underestimated."""
    pictures: dict[Hashable, list[Hashable]] = {}
    for number, (key, sample) in enumerate(new.items()):
        pictures.setdefault(tuple(map(image_key, sample.images)) or number, []).append(key)

    def length(key: Hashable) -> int:
        return len(prompt_key(new[key]))

    groups = [sorted(group, key=length, reverse=True) for group in pictures.values()]
    return [key for group in sorted(groups, key=lambda group: length(group[0]), reverse=True) for key in group]


def _bar(progress: bool | None) -> Progress:
    shown = sys.stderr.isatty() if progress is None else progress
    return Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, force_terminal=shown),
        disable=not shown,
    )
