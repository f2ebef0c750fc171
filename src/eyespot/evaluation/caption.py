"""A caption for every picture of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eyespot.inference import Assistant, user_turn
from eyespot.processing.images import ImageError, open_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def caption_folder(
    assistant: Assistant, folder: Path, out: Path, *, prompt: str = "", batch_size: int = 16, **generation: Any
) -> tuple[int, int]:
    """Write one JSON line ``{"image", "caption"}`` or ``{"image", "error"}`` for each picture under a folder.

    Lines are written as they come; a picture that has a line already is skipped, so an interrupted call goes on.

    Returns:
        How many captions and how many errors were written now.

    Raises:
        ValueError: no such folder, no picture in it, or a batch size below 1.
    """

    def describe(batches: Sequence[list[Path]]) -> Iterator[list[dict[str, str]]]:
        return (caption_batch(assistant, folder, batch, prompt, generation) for batch in batches)

    return write_captions(describe, folder, out, batch_size)


def write_captions(
    describe: Callable[[Sequence[list[Path]]], Iterable[list[dict[str, str]]]], folder: Path, out: Path, batch_size: int
) -> tuple[int, int]:
    """``caption_folder`` with whatever describes batches of pictures; it keeps their order."""
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be at least 1")
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give a folder of pictures")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise ValueError(f"{str(folder)!r} holds no picture; known endings: {', '.join(sorted(SUFFIXES))}")
    known = written(out)
    todo = [path for path in pictures if str(path.relative_to(folder)) not in known]
    counts = [0, 0]
    out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with out.open("a", encoding="utf-8") as file, Progress(
        TextColumn("captions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(pictures), completed=len(pictures) - len(todo))
        for rows in describe([todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]):
            for row in rows:
                counts["error" in row] += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.advance(task)
            file.flush()
    return counts[0], counts[1]


def written(out: Path) -> set[str]:
    """Names of the pictures that have a line already; a line cut off by an interruption is removed from the file.

    Raises:
        ValueError: a whole line is not what this function writes.
    """
    if not out.exists():
        return set()
    text = out.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        out.write_text(whole, encoding="utf-8")
    names = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            names.add(json.loads(line)["image"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(out)!r} line {number} is no caption line; give another --out") from error
    return names


def caption_batch(
    assistant: Assistant, folder: Path, paths: list[Path], prompt: str, generation: dict[str, Any]
) -> list[dict[str, str]]:
    """The lines for some pictures."""
    rows: dict[Path, dict[str, str]] = {}
    readable = []
    for path in paths:
        try:
            readable.append((path, open_image(path)))
        except ImageError as error:
            rows[path] = {"image": str(path.relative_to(folder)), "error": str(error)}
    if readable:
        answers = assistant.generate_text(
            [([image], user_turn([image], prompt)) for _, image in readable], **generation
        )
        for (path, _), answer in zip(readable, answers, strict=True):
            rows[path] = {"image": str(path.relative_to(folder)), "caption": answer}
    return [rows[path] for path in paths]
