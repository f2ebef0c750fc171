"""docs/tutorial.md does what it says: its code runs from top to bottom, and prints what it shows.

A block of kind ``text`` is what the code before it prints: as it stands, or, if it is called approximate, but for its
numbers, which depend on the machine. ``python tests/test_tutorial.py`` writes what is printed, and the pictures, anew.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from eyespot.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)( approximate)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(\.\d+)?")
RUN = ("eyespot ask",)  # of the commands on the page, those that end by themselves
MOST_BYTES = 150_000


@dataclass
class Run:
    """What was printed beside what the page shows, and the names and files that the code left."""

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    outputs: list[tuple[str, str, bool]] = field(default_factory=list)

    def python(self, code: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(PAGE), "exec"), self.names)
        return printed.getvalue()

    def commands(self, lines: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for line in lines.splitlines():
                if line.startswith(RUN):
                    assert main(shlex.split(line, comments=True)[1:]) == 0
        return printed.getvalue()


def blocks() -> list[tuple[str, bool, str]]:
    """(kind, approximate, content) of every block."""
    return [(kind, bool(mark), content) for kind, mark, content in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def run_page(folder: Path) -> Run:
    run, printed = Run(folder), ""
    with contextlib.chdir(folder):
        for kind, approximate, content in blocks():
            if kind == "text":
                run.outputs.append((printed, content, approximate))
                printed = ""
            else:
                assert not printed, f"the page does not show what is printed: {printed}"
                printed = run.python(content) if kind == "python" else run.commands(content)
    assert not printed
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    pytest.importorskip("matplotlib")
    return run_page(tmp_path_factory.mktemp("tutorial"))


def test_it_prints_what_the_page_shows(run: Run) -> None:
    exact = [pair[:2] for pair in run.outputs if not pair[2]]
    assert len(exact) >= 8
    for printed, shown in exact:
        assert printed == shown


def test_approximate_outputs_differ_in_numbers_only(run: Run) -> None:
    found = [pair[:2] for pair in run.outputs if pair[2]]
    assert len(found) >= 2
    for printed, shown in found:
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)


def test_the_model_learned_to_see(run: Run) -> None:
    evaluation = run.names["evaluation"]
    assert evaluation.sees and evaluation.accuracy > 0.9
    assert evaluation.controls["blind"].accuracy < 0.5 and evaluation.controls["shuffled"].accuracy < 0.5


def test_the_pictures_are_those_of_the_code(run: Run) -> None:
    shown = re.findall(r"!\[[^]]+\]\(tutorial/([\w-]+\.png)\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(path.name for path in (PAGE.parent / "tutorial").iterdir())
    assert sorted(shown) == sorted(path.name for path in run.folder.glob("*.png"))
    for name in shown:
        committed, drawn = PAGE.parent / "tutorial" / name, run.folder / name
        assert committed.stat().st_size < MOST_BYTES
        with PIL.Image.open(committed) as ours, PIL.Image.open(drawn) as theirs:
            assert ours.size == theirs.size


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target


def rewrite() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = run_page(Path(folder))
        printed = iter([output for output, _, _ in run.outputs])
        PAGE.write_text(
            BLOCK.sub(
                lambda block: f"```text{block[2] or ''}\n{next(printed)}```" if block[1] == "text" else block[0],
                PAGE.read_text(encoding="utf-8"),
            ),
            encoding="utf-8",
        )
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, PAGE.parent / "tutorial")


if __name__ == "__main__":
    rewrite()
