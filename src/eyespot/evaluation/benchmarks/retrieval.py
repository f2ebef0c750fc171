"""Retrieval as a benchmark of the command line: pictures found by their texts, and texts by their pictures.

Source of the measure: recall at 1, 5 and 10 as in Karpathy and Fei-Fei, arXiv 1412.2306, section 4.1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eyespot import __version__
from eyespot.data import sources
from eyespot.data.sample import Rejected, Sample
from eyespot.evaluation.benchmarks.base import Benchmark, Reference, Scored
from eyespot.evaluation.results import REPORT_FILE, write_atomically
from eyespot.evaluation.retrieval import Retrieval, evaluate_retrieval
from eyespot.inference import Assistant

DIRECTIONS = {"image_to_text": "text of a picture", "text_to_image": "picture of a text"}


class RetrievalBenchmark(Benchmark):
    """Pictures with captions, or of any data format in which a sample is one picture with one text or several.

    Nothing is asked and there are no answers: the model's alignment head compares (see ``evaluate_retrieval``).

    Args:
        path, image_folder, split, prompt: options of the format's reader; those not given are left to it.
        format: name of a data format.
        rerank: so many candidates of each query are put in order by the matching head.
    """

    measure = "recall@1"

    def __init__(
        self,
        path: str | None = None,
        image_folder: str | None = None,
        split: str | None = None,
        prompt: str | None = None,
        format: str = "captions",
        rerank: int = 0,
    ) -> None:
        options = {"path": path, "image_folder": image_folder, "split": split, "prompt": prompt}
        self.options = {name: value for name, value in options.items() if value is not None}
        self.format, self.rerank = format, rerank

    def read(self) -> Iterator[Sample | Rejected]:
        return sources.records(self.format, self.options)

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """Raises ValueError: there are no answers."""
        raise ValueError("retrieval scores no answers; call its method find, or eyespot evaluate MODEL")

    def find(self, assistant: Assistant, samples: Sequence[Sample], batch_size: int) -> Retrieval:
        """How much is found by a model with an alignment head; raises ValueError as ``evaluate_retrieval``."""
        return evaluate_retrieval(assistant, samples, rerank=self.rerank, batch_size=batch_size)

    def write(self, folder: Path, found: Retrieval, name: str) -> Path:
        """Write report.json, whole or not at all.

        Args:
            name: of the model.
        """
        settings = {"source": dict(self.source), "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "eyespot": __version__}  # fmt: skip
        report = {"name": name, "benchmark": "retrieval", **found.to_dict(), "settings": settings}
        return write_atomically(folder / REPORT_FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def show(found: Retrieval, console: Console) -> None:
    """A table with a row for each direction and number of answers that are looked at."""
    reranked = f", {found.reranked} candidates reranked" if found.reranked else ""
    console.print(f"retrieval among {found.num_images:,} pictures and {found.num_texts:,} texts{reranked}")
    table = Table(box=None, pad_edge=False)
    for name in ("look for", "measure", "found", "95% interval", "chance"):
        table.add_column(name, justify="right" if name in ("found", "chance") else "left")
    for direction, words in DIRECTIONS.items():
        for at, recall in getattr(found, direction).items():
            low, high = (f"{100 * end:.1f}%" for end in recall.interval)
            table.add_row(
                words, f"recall@{at}", f"{recall.recall:.1%}", f"{low} to {high}", f"{100 * recall.chance:.2g}%"
            )
    console.print(table)
