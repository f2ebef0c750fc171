"""A Space of Hugging Face as a folder: the page, the model, and the code that runs it.

The folder needs nothing but the packages of its requirements.txt: ``python app.py`` in it shows the page. Before it may
be pushed, the model in it, asked by the code in it, has to look at pictures (see ``eyespot.export.sensitivity``).
Source of README's header: https://huggingface.co/docs/hub/spaces-config-reference
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import eyespot
from eyespot.data.sample import Sample
from eyespot.export.card import Record, licence_of
from eyespot.export.hub import SPACE_SUFFIXES, Item, files_of, refusal, stage_model
from eyespot.export.licences import data_of
from eyespot.export.sensitivity import Sensitivity, write_questions
from eyespot.processing.images import open_image

TEMPLATE = Path(__file__).parent / "template"
PAGE_FILE, SENSITIVITY_FILE, LICENCE_FILE = "page.json", "sensitivity.json", "LICENSE"
NUM_QUESTIONS, NUM_EXAMPLES = 48, 4
# under which a picture may be shown again, if the card names where it is from
SHAREABLE = ("mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0")
TIMEOUT_S = 1800.0


def make_bundle(
    record: Record, repo: str, folder: Path, examples: Sequence[Sample], licence: str | None = None
) -> list[Item]:
    """Fill a new folder with the Space of a model.

    Args:
        repo: the Space's name, "owner/name".
        examples: the page shows the first few of these questions; see ``may_be_shown``.

    Returns:
        The files that would go, and those that must not.
    """
    folder.mkdir(parents=True)
    staged = stage_model(record, repo, folder / "model", licence, "model")
    code = Path(eyespot.__file__).parent
    shutil.copytree(code, folder / "eyespot", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (folder / "eyespot" / LICENCE_FILE).write_text(own_licence(), encoding="utf-8")
    for name in ("app.py", "requirements.txt"):
        (folder / name).write_text((TEMPLATE / name).read_text("utf-8").format_map(versions()), encoding="utf-8")
    terms = licence_of(record, licence)
    facts = {"title": repo.partition("/")[2], "license": terms.name if terms else "other", **versions()}
    (folder / "README.md").write_text((TEMPLATE / "README.md").read_text("utf-8").format_map(facts), encoding="utf-8")
    write_page(facts["title"], examples[:NUM_EXAMPLES], folder)
    left_out = [
        replace(item, path=f"model/{item.path}") for item in staged if not (folder / "model" / item.path).exists()
    ]
    return [*(_item(path, folder) for path in files_of(folder)), *left_out]


def may_be_shown(source: Mapping[str, Any]) -> bool:
    """Whether the terms of a source of questions let its pictures stand on a public page."""
    return all(part.terms and part.terms.name in SHAREABLE for part in data_of([("test", source)]))


def _item(path: Path, folder: Path) -> Item:
    name, size = str(path.relative_to(folder)), path.stat().st_size
    if path.suffix not in SPACE_SUFFIXES and path.name not in ("NOTICE", LICENCE_FILE):
        return Item(name, size, f"no part of a Space ({path.suffix or 'no ending'}); move it out of the folder")
    return Item(name, size, refusal(path))


def own_licence() -> str:
    """The licence of eyespot's code, a copy of which goes with it (Apache 2.0, section 4).

    Raises:
        ValueError: neither the source tree nor the installed package has it.
    """
    files = [Path(eyespot.__file__).parents[2] / LICENCE_FILE]
    with contextlib.suppress(metadata.PackageNotFoundError):
        files += [Path(file.locate()) for file in metadata.files("eyespot") or () if file.name == LICENCE_FILE]
    for file in files:
        if file.is_file():
            return file.read_text("utf-8")
    raise ValueError("the licence of eyespot's code is not installed with it; install eyespot again")


def versions() -> dict[str, str]:
    """With which the bundle is checked here, and is to run there.

    Raises:
        ImportError: gradio is not installed.
    """
    try:
        found = {name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers", "gradio")}
    except metadata.PackageNotFoundError as error:
        raise ImportError(f'a Space needs {error.name}; pip install "eyespot[serve]"') from error
    return {**found, "python": ".".join(platform.python_version_tuple()[:2])}


def write_page(title: str, samples: Sequence[Sample], folder: Path) -> None:
    """What the page says and shows beside the model: its title, and examples of pictures with questions."""
    (folder / "examples").mkdir()
    rows = []
    for number, sample in enumerate(samples):
        name = f"examples/{number}.png"
        open_image(sample.images[0]).save(folder / name)
        rows.append([name, " ".join(p["text"] for p in sample.messages[0]["content"] if p["type"] == "text")])
    page = {"title": title, "examples": rows}
    (folder / PAGE_FILE).write_text(json.dumps(page, indent=2, ensure_ascii=False), encoding="utf-8")


def choose(samples: Sequence[Sample], number: int = NUM_QUESTIONS) -> list[Sample]:
    """Questions of one turn about one picture each, no picture twice, drawn by chance."""
    usable = [s for s in samples if len(s.images) == 1 and len(s.messages) == 2]
    random.Random(0).shuffle(usable)
    first: dict[str, Sample] = {}
    for sample in usable:
        first.setdefault(sample.group, sample)
    return list(first.values())[:number]


def check_bundle(bundle: Path, samples: Sequence[Sample]) -> Sensitivity:
    """Let the bundle's own code, in a process of its own, ask the bundle's model; keep what it found in the bundle.

    Raises:
        NotSensitive: the model does not look at pictures.
        ValueError: too few pictures, or the bundle does not run.
    """
    questions = bundle.with_name(f"{bundle.name}-questions")
    write_questions(samples, questions)
    environment = {**os.environ, "PYTHONPATH": str(bundle.resolve()), "HF_HUB_OFFLINE": "1"}
    words = ["-m", "eyespot.export.sensitivity", "model", str(questions.resolve())]
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=bundle, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the model in {str(bundle)!r} did not answer {len(samples)} questions in {TIMEOUT_S / 60:.0f} minutes; a "
            "Space would be as slow"
        ) from None
    finally:
        shutil.rmtree(questions)
        for cached in bundle.rglob("__pycache__"):
            shutil.rmtree(cached)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"the model in {str(bundle)!r} cannot be asked by the code in it: {last}")
    found = Sensitivity(**json.loads(done.stdout.strip().rpartition("\n")[2]))
    if Path(found.code) != bundle.resolve() / "eyespot":
        raise ValueError(f"the bundle was run by the code in {found.code!r}, not by its own")
    found.check()
    row = {key: value for key, value in vars(found).items() if key != "code"}
    (bundle / SENSITIVITY_FILE).write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    return found


def show(folder: str | Path) -> None:
    """The page of the bundle in a folder; what its app.py calls."""
    from eyespot.serving.page import launch

    folder = Path(folder)
    page = json.loads((folder / PAGE_FILE).read_text("utf-8"))
    examples = [(folder / name, question) for name, question in page["examples"]]
    launch({page["title"]: folder / "model"}, title=page["title"], examples=examples)
