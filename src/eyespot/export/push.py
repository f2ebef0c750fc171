"""What ``eyespot push`` does: show what would go to the Hub, and send it only when it is told to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from eyespot.evaluation.finish import load_test, source_of
from eyespot.export.card import Record, read_record
from eyespot.export.hub import Item, check_items, check_repo, show, stage_model, upload
from eyespot.export.space import SENSITIVITY_FILE, check_bundle, choose, make_bundle, may_be_shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push(
    source: str | Path,
    repo: str,
    *,
    space: bool = False,
    yes: bool = False,
    private: bool = False,
    licence: str | None = None,
    out: str | Path | None = None,
    questions: Sequence[str] = (),
    api: HfApi | None = None,
) -> Iterator[str]:
    """Lines that say what would go, and, with ``yes``, where it went.

    Args:
        source: folder of a run, or of its model.
        repo: "owner/name" on the Hub; it is made if there is none.
        space: a Space with page, code and model in place of a model alone; it has to pass its check.
        out: keep what would go in this folder.
        questions: key=value words as ``eyespot evaluate`` takes them, for the check; by default the run's own test.

    Raises:
        ValueError: no trained model there, a file that must not go, or a Space whose model does not look at pictures.
    """
    check_repo(repo)
    record = read_record(source)
    with _folder(out) as folder:
        if space:
            items = yield from _space(record, repo, folder, licence, questions)
        else:
            items = stage_model(record, repo, folder, licence)
            yield "README.md:\n\n" + (folder / "README.md").read_text("utf-8")
        yield from show(items)
        if yes:
            check_items(items)
            kind = "space" if space else "model"
            yield f"pushed: {upload(folder, repo, kind=kind, private=private, message=f'Push {record.name}', api=api)}"
        else:
            kept = f" (kept: {out})" if out else ""
            yield f"nothing was sent; to send it to {repo}, in place of all that is there, add --yes{kept}"


def _space(
    record: Record, repo: str, folder: Path, licence: str | None, words: Sequence[str]
) -> Generator[str, None, list[Item]]:
    """The bundle, checked."""
    source = source_of(str(record.model), words)
    chosen = choose(load_test(source)[1])
    items = make_bundle(record, repo, folder, chosen if may_be_shown(source) else (), licence)
    check_items(items)
    yield "asking the model of the bundle, by the code of the bundle …"
    yield f"it looks at pictures: {check_bundle(folder, chosen)}"
    return [*items, Item(SENSITIVITY_FILE, (folder / SENSITIVITY_FILE).stat().st_size)]


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """A folder that is not there yet: the one that was asked for, or one that vanishes."""
    if out is not None:
        if Path(out).exists():
            raise ValueError(f"{str(out)!r} exists; give a new folder")
        try:
            yield Path(out)
        except Exception:
            shutil.rmtree(out, ignore_errors=True)
            raise
        return
    temporary = Path(tempfile.mkdtemp(prefix="eyespot-push-"))
    try:
        yield temporary / "push"
    finally:
        shutil.rmtree(temporary)
