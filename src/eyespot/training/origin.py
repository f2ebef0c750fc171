"""Where a run comes from: the command, the commits of the code, versions and the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from eyespot import __file__ as package_file
from eyespot import __version__

LIBRARIES = ("torch", "transformers", "peft", "lightning")
TIMEOUT_S = 10.0


def origin() -> dict[str, str]:
    """command (if the command line was used), git_commit (of the repository around the working directory),
    eyespot_commit (of that around the package), versions, hardware; what is not known is left out."""
    found = {
        "command": command(),
        "git_commit": git_commit(Path.cwd()),
        "eyespot_commit": git_commit(Path(package_file).parent),
        "versions": ", ".join([f"eyespot {__version__}", f"python {platform.python_version()}", *_versions()]),
        "hardware": hardware(),
    }
    return {name: value for name, value in found.items() if value}


def command() -> str | None:
    """The words of this process, if it is ``eyespot VERB ...`` or ``python -m eyespot VERB ...``."""
    program = Path(sys.argv[0])
    called = program.stem == "eyespot" or program.parts[-2:] == ("eyespot", "__main__.py")
    return shlex.join(["eyespot", *sys.argv[1:]]) if called else None


def hardware() -> str:
    """The GPU if there is one, else the processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """Linux tells the model in /proc/cpuinfo only; elsewhere the platform says what it can."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def git_commit(folder: Path) -> str | None:
    """The commit of the repository around a folder, and "(changed)" if files differ; None without a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = commit and _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} (changed)" if changed else commit


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> list[str]:
    return [f"{name} {metadata.version(name)}" for name in LIBRARIES if _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
