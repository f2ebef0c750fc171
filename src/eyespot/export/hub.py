"""A model's way to the Hub and back: what goes is shown first, and only data goes, no code and no secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open

from eyespot.compose import PICKLES
from eyespot.export.card import PLOTS, REPORT_FILE, Record, write_card
from eyespot.models.vlm import VLMConfig

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
SPACE_SUFFIXES = (*MODEL_SUFFIXES, ".md", ".png", ".py", ".yaml", ".typed")
# nothing that is executed when it is read. Source of the patterns' form: fnmatch, as huggingface_hub takes them
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "NOTICE"]
# Source: https://huggingface.co/docs/hub/storage-limits
MAX_FILE_BYTES, MAX_FILES = 50_000_000_000, 100_000
SECRETS = {  # what begins like a key of a service; each needs its length, so that words do not look like one
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{30,}",
    "a key of OpenAI or Anthropic": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "a token of GitLab": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "a token of Slack": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a key of AWS": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[A-Za-z0-9_-]{35}",
    "a signed address": r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig|token|access_token)=[\w%+/=.-]{16,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^/\s:@\"']*:[^/\s:@\"']{3,}@",
}
HOME = r"(?:/(?:home|Users)/[\w.-]+|/root)(?:/[\w.-]+)+|[A-Za-z]:\\\\?Users\\\\?[\w.-]+"
ABSOLUTE = re.compile(r"(?:~?/[^\s/\\:]+/|[A-Za-z]:[/\\]|\\\\[\w.-]+\\)\S*")
WRITTEN = ("README.md", "NOTICE", ".gitattributes", REPORT_FILE, *PLOTS)  # anew; a model that was downloaded has them
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # any text may be a word


@dataclass(frozen=True)
class Item:
    """A file that would go, by its path in the repository; refused: why it must not, or ""."""

    path: str
    num_bytes: int
    refused: str = ""


def stage_model(
    record: Record, repo: str, folder: Path, licence: str | None = None, inside: str | None = None
) -> list[Item]:
    """Put what would go into a new folder: the model, its card and notices, the report and plots. Weights are links.

    Paths of this machine in JSON files become their last part.

    Args:
        inside: the folder's name in a repository that holds more.

    Returns:
        The files that would go, and those of the model's folder that must not.
    """
    folder.mkdir(parents=True)
    sources = [source for source in files_of(record.model) if source.name not in WRITTEN]
    items = [_put(source, folder / source.relative_to(record.model), folder) for source in sources]
    (folder / "README.md").write_text(write_card(record, repo, licence, inside), encoding="utf-8")
    notices = [part.terms.notice for part in record.weights if part.terms and part.terms.notice]
    if notices:
        (folder / "NOTICE").write_text("\n".join(notices) + "\n", encoding="utf-8")
    if record.report is not None:
        (folder / REPORT_FILE).write_text(json.dumps(without_paths(record.report), indent=2), encoding="utf-8")
    for plot in record.plots:
        shutil.copyfile(plot, folder / plot.name)
    known = {item.path for item in items}
    added = [path for path in files_of(folder) if str(path.relative_to(folder)) not in known]
    return [*items, *(Item(path.name, path.stat().st_size, refusal(path)) for path in added)]


def files_of(folder: Path) -> list[Path]:
    """All files, but those of version control and caches."""
    hidden = (".git", ".cache", "__pycache__", ".DS_Store")
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in inside if not set(hidden) & set(path.relative_to(folder).parts)]


def _put(source: Path, target: Path, folder: Path) -> Item:
    """A file of a model in the folder: JSON without paths of this machine, anything else as a link; what belongs to no
    model is not put."""
    name = str(target.relative_to(folder))
    if source.suffix not in MODEL_SUFFIXES:
        what = "a pickle can run any code when it is loaded" if source.suffix in PICKLES else "it is no part of a model"
        return Item(name, source.stat().st_size, f"{what}; move it out of the folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".safetensors":
        link_or_copy(source.resolve(), target)
    elif source.suffix == ".json" and source.name not in VOCABULARY:
        values = without_paths(json.loads(source.read_text("utf-8")))
        target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, target)
    return Item(name, target.stat().st_size, refusal(target))


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, where the disk can do that, so that a gigabyte is not written twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def without_paths(values: Any) -> Any:
    """Plain values in which a text that is nothing but an absolute path is its last part.

    >>> without_paths({"path": "/data/sets/a.json", "ratio": [1, "a/b"]})
    {'path': 'a.json', 'ratio': [1, 'a/b']}
    """
    if isinstance(values, dict):
        return {key: without_paths(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_paths(value) for value in values]
    if isinstance(values, str) and ABSOLUTE.fullmatch(values):
        return re.split(r"[/\\]", values.rstrip("/\\"))[-1]
    return values


def refusal(file: Path) -> str:
    """Why a file must not go, or "": too large, weights that are none, a secret, or a path of this machine."""
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        return f"{size / 1e9:.1f} GB, the Hub takes {MAX_FILE_BYTES / 1e9:.0f} GB; save it in smaller shards"
    if file.suffix in (".png", ".model"):
        return ""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                text = json.dumps(tensors.metadata() or {})
        except SafetensorError as error:
            return f"is no safetensors file ({error}); save the model again"
    else:
        text = file.read_text("utf-8", errors="replace")
    for what, pattern in SECRETS.items():
        if found := re.search(pattern, text):
            return f"holds {what}: {found.group()[:8]}…; take it out, and have it replaced: it may have been seen"
    if file.name not in VOCABULARY and (found := re.search(HOME, text)):
        return f"names a folder of this machine: {found.group()}; write a name that means something elsewhere"
    return ""


def show(items: list[Item]) -> Iterator[str]:
    """Lines for the terminal."""
    for item in items:
        yield f"  {_size(item.num_bytes):>10}  {item.path}" + (f"  REFUSED: {item.refused}" if item.refused else "")
    good = [item for item in items if not item.refused]
    yield f"{len(good)} files, {_size(sum(item.num_bytes for item in good))}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:,.1f} kB"


def check_items(items: list[Item]) -> None:
    """Raise ValueError if something must not go: half a model is none."""
    refused = [item for item in items if item.refused]
    if refused:
        raise ValueError(f"{len(refused)} files are refused, first {refused[0].path!r}: {refused[0].refused}")
    if len(items) > MAX_FILES:
        raise ValueError(f"{len(items):,} files, the Hub takes {MAX_FILES:,}; give the folder of a model")


def upload(folder: Path, repo: str, *, kind: str, private: bool, message: str, api: HfApi | None = None) -> str:
    """Make the repository if there is none, and commit the folder to it in place of what it held; returns the commit's
    address.

    Args:
        kind: "model" or "space".

    Raises:
        ValueError: it was to be private and is there already, for everybody to see.
    """
    api = api or HfApi()
    sdk = "gradio" if kind == "space" else None
    with _reached():
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk)
        if private and not api.repo_info(repo, repo_type=kind).private:
            raise ValueError(
                f"{repo!r} is public already, so nothing was sent; make it private there or drop --private"
            )
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type=kind, commit_message=message, delete_patterns="*"
        )
    return str(done.commit_url)


def check_repo(repo: str) -> None:
    """Raise ValueError for what is no name of a repository."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise ValueError(f"{repo!r} is no name of a repository; write owner/name")


def download(repo: str, out: str | Path, revision: str | None = None, endpoint: str | None = None) -> str:
    """A model from the Hub as a folder, of one commit whatever happens there meanwhile; an interrupted one goes on.

    Returns:
        The commit.

    Raises:
        ValueError: the repository holds no eyespot model, or the folder is not empty; nothing was changed there.
        OSError: it does not exist, or cannot be reached.
    """
    check_repo(repo)
    begun = Path(out) / ".cache" / "eyespot-download"  # says whose interrupted download the folder is
    if Path(out).exists() and any(Path(out).iterdir()) and not (begun.is_file() and begun.read_text() == repo):
        raise ValueError(f"{str(out)!r} exists already; give a new folder, or delete it first")
    api = HfApi(endpoint=endpoint)
    with _reached():
        commit = api.model_info(repo, revision=revision).sha
        assert commit is not None
        with tempfile.TemporaryDirectory() as apart:
            file = api.hf_hub_download(repo, "config.json", revision=commit, local_dir=apart)
            kind = json.loads(Path(file).read_text("utf-8")).get("model_type")
        if kind != VLMConfig.model_type:
            raise ValueError(
                f"{repo!r} holds a model of type {kind!r}, not {VLMConfig.model_type!r}; see `eyespot import`"
            )
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(repo)
        snapshot_download(repo, revision=commit, local_dir=out, allow_patterns=DOWNLOADED, endpoint=endpoint)
    begun.unlink()
    return commit


@contextmanager
def _reached() -> Iterator[None]:
    """What the network raises becomes an OSError; the Hub's own refusals are some already."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
            raise
        raise OSError(f"the Hub cannot be reached ({error}); the same command goes on where this stopped") from error
