"""Conversations about pictures as LLaVA-Instruct writes them.

Source: https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from eyespot.data.formats.records import BadRecord, existing_file, image_file, record_id
from eyespot.data.sample import ContentPart, Message, Rejected, Sample, image_part, text_part

# One line break on each side belongs to the marker: LLaVA writes "<image>\nquestion" and "question\n<image>".
_MARKER = re.compile(r"(?:\r?\n)?<image>(?:\r?\n)?")
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
}


def read_llava(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    image_url: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    timeout_s: float = 10.0,
    retries: int = 3,
) -> Iterator[Sample | Rejected]:
    """A JSON list of `{"id", "image", "conversations": [{"from": "human" or "gpt", "value": text}, ...]}`.

    The turns of a human hold as many "<image>" markers as the record has images, and a marker keeps its place; one
    line break on each side of it is dropped. "image" may be missing (text only), a name, a list of names, or an http(s)
    URL. A turn "system" may come first; then human and gpt alternate, and gpt is last.

    Args:
        path: the JSON file.
        image_folder: where relative names start; the folder of the file unless given.
        image_url: text put before every name to make it a URL; not together with `image_folder`.
        cache_dir: where fetched pictures are kept; `~/.cache/eyespot/images` unless given.
        timeout_s: limit of one attempt to fetch a picture.
        retries: further attempts after the first.

    Raises:
        ValueError: no such file, not JSON (with line and column), not a list, or both places of images given.
    """
    if image_url is not None and image_folder is not None:
        raise ValueError(f"image_folder={str(image_folder)!r} and image_url={image_url!r} were both given; drop one")
    file = existing_file(path)
    folder = file.parent if image_folder is None else image_folder
    cache = Path.home() / ".cache" / "eyespot" / "images" if cache_dir is None else Path(cache_dir)

    def find(name: object) -> str:
        url = _url(name, image_url)
        return image_file(name, folder) if url is None else _fetched(url, cache, timeout_s, retries)

    for number, record in enumerate(_records(file), 1):
        id = f"{file.stem}:{number}"
        try:
            if not isinstance(record, dict):
                raise BadRecord("record is not a JSON object", type(record).__name__)
            id = record_id(record, id)
            yield _sample(id, record, find)
        except BadRecord as bad:
            yield bad.rejected(id)


def _records(file: Path) -> list[Any]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(file)!r} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; correct it there"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if not isinstance(records, list):
        raise ValueError(  # noqa: TRY004  bad data is always a ValueError
            f"{str(file)!r} holds a JSON {type(records).__name__}; LLaVA's format is a list of records"
        )
    return records


def _url(name: object, prefix: str | None) -> str | None:
    if not isinstance(name, str) or not name:
        return None
    if name.startswith(("http://", "https://")):
        return name
    return None if prefix is None else f"{prefix.rstrip('/')}/{quote(name)}"


def _fetched(url: str, cache: Path, timeout_s: float, retries: int) -> str:
    # Late, because it brings transformers and torch, and most data sets lie on the disk.
    from eyespot.processing.images import ImageError, fetch_image

    try:
        return str(fetch_image(url, cache, timeout_s, retries))
    except ImageError as error:
        raise BadRecord("image cannot be fetched", str(error)) from None


def _sample(id: str, record: dict[str, Any], find: Callable[[object], str]) -> Sample:
    messages = _messages(record.get("conversations"))
    image = record.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    num_markers = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_markers != len(names):
        raise BadRecord("number of <image> differs from the number of images", f"{num_markers} and {len(names)}")
    return Sample(id, tuple(find(name) for name in names), messages, group="|".join(map(str, names)))


def _messages(turns: object) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise BadRecord("'conversations' is not a list of turns", repr(turns)[:80])
    messages = tuple(_message(turn) for turn in turns)
    spoken = [message["role"] for message in messages]
    if spoken[0] == "system":
        spoken = spoken[1:]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        said = " ".join(turn["from"] for turn in turns)
        raise BadRecord("human and gpt do not alternate from a human to a gpt turn", said[:80])
    return messages


def _message(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise BadRecord("turn is not a JSON object", type(turn).__name__)
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise BadRecord("turn is neither from human nor gpt nor system", repr(speaker)[:80])
    if not isinstance(value, str) or not value.strip():
        raise BadRecord("turn has no text", f"{speaker}: {value!r}"[:80])
    if speaker == "human":
        return {"role": "user", "content": _parts(value)}
    if _MARKER.search(value):
        raise BadRecord("<image> stands outside a human turn", f"{speaker}: {value!r}"[:80])
    return {"role": _ROLES[speaker], "content": [text_part(value)]}


def _parts(value: str) -> list[ContentPart]:
    """Text and image parts in the order of the text; pieces of blanks alone are dropped."""
    parts: list[ContentPart] = []
    for index, piece in enumerate(_MARKER.split(value)):
        if index:
            parts.append(image_part())
        if piece.strip():
            parts.append(text_part(piece))
    return parts
