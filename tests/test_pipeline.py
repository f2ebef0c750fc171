"""From a clean checkout to an exported model; the files that describe the way to DVC, Docker, GitHub and make."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from eyespot import cli
from eyespot.evaluation.results import METRICS_FILE
from eyespot.registry import EXPORTS
from eyespot.training.run import choices

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_yaml(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return found


# --- the pipeline -------------------------------------------------------------------------------------------------


class Checkout:
    """A new repository with the files that git knows here, in which ``eyespot`` is the code of that repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        names = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        git(self.folder, "init", "--quiet")
        git(self.folder, "add", "--all")
        git(self.folder, "-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "--quiet", "--message", "all")
        command = folder / "bin" / "eyespot"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -W ignore -m eyespot "$@"\n')
        command.chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "src"), "DVC_SITE_CACHE_DIR": str(folder / "site"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def dvc(self, *words: str) -> str:
        """What ``dvc WORDS`` prints."""
        command = [sys.executable, "-W", "ignore", "-m", "dvc", *words]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0 and "failed to load" not in done.stderr, done.stdout + done.stderr
        return done.stdout

    def set(self, **params: Any) -> None:
        """Change params.yaml."""
        file = self.folder / "params.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **params}))


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clean checkout after ``dvc repro`` with the smoke recipe."""
    pytest.importorskip("dvc")
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository: what a checkout holds is not known")
    found = Checkout(tmp_path_factory.mktemp("pipeline"))
    found.set(recipe="smoke", settings="trainer.max_steps=4 evaluation.pictures=0", questions=24)
    said = found.dvc("repro")
    assert [f"Running stage '{name}'" in said for name in ("prepare", "train", "evaluate", "export")] == [True] * 4
    return found


def test_the_second_time_nothing_runs(checkout: Checkout) -> None:
    said = checkout.dvc("repro")
    assert "up to date" in said and "Running" not in said


def vega(checkout: Checkout, plot: str) -> list[dict[str, Any]]:
    """The data of a plot, as the page gets them."""
    rows: list[dict[str, Any]] = json.loads(checkout.dvc("plots", "show", "--show-vega", plot))["data"]["values"]
    return rows


def test_metrics_and_plots_are_shown(checkout: Checkout) -> None:
    (shown,) = json.loads(checkout.dvc("metrics", "show", "--json")).values()
    (metrics,) = (file["data"] for file in shown["data"].values())
    report = json.loads((checkout.folder / "runs/pipeline/evaluation/report.json").read_text())
    assert metrics["accuracy"] == report["accuracy"] and metrics["questions"] == 24
    assert {"blind", "shuffled", "majority", "above_blind", "low", "high"} <= metrics.keys()
    losses = vega(checkout, "runs/pipeline/losses")
    assert {row["field"] for row in losses} == {"train/loss", "val/loss"}
    assert any(float(row["train/loss"] or 0) > 1 for row in losses)
    wrong = [(row["truth"], row["prediction"], row["count"]) for row in vega(checkout, "confusions")]
    assert wrong == [(row["truth"], row["prediction"], row["count"]) for row in report["confusions"]] != []


def test_only_what_depends_on_a_change_runs_again(checkout: Checkout) -> None:
    before = (checkout.folder / "params.yaml").read_text()

    def changed() -> set[str]:
        return set(json.loads(checkout.dvc("status", "--json")))

    checkout.set(questions=23)
    assert changed() == {"evaluate"}
    (checkout.folder / "params.yaml").write_text(before)
    for name, stages in (
        ("evaluation/metrics.py", {"evaluate"}),
        ("configs/recipe/smoke.yaml", {"prepare", "train"}),
        ("compose.py", {"train", "evaluate"}),
    ):
        file = checkout.folder / "src/eyespot" / name
        code = file.read_text()
        file.write_text(f"{code}# changed\n")
        assert changed() == stages, name
        file.write_text(code)


def test_stages_use_verbs_and_files_that_exist() -> None:
    described = read_yaml("dvc.yaml")
    params = read_yaml("params.yaml")
    for name, stage in described["stages"].items():
        command = stage["cmd"] if isinstance(stage["cmd"], str) else stage["cmd"][0]
        assert command.split()[0] == "eyespot" and command.split()[1] in cli.VERBS, name
        used = set(re.findall(r"\$\{(\w+)\}", command))
        assert used == set(stage["params"]) <= params.keys(), "a parameter that is used is one that is watched"
        for path in stage["deps"]:
            assert path.startswith("runs/") or (ROOT / path).exists(), path
    assert set().union(*(stage["params"] for stage in described["stages"].values())) == params.keys()
    assert params["export"] in EXPORTS and params["recipe"] in choices("recipe")
    assert described["stages"]["evaluate"]["metrics"] == [f"runs/pipeline/evaluation/{METRICS_FILE}"]


# --- pins ---------------------------------------------------------------------------------------------------------


def pins() -> list[Requirement]:
    file = ROOT / os.environ.get("CONSTRAINTS", "constraints.txt")
    return [Requirement(line) for line in file.read_text().splitlines() if line and not line.startswith("#")]


def test_installed_versions_are_the_pinned_ones() -> None:
    found = {}
    for pin in pins():
        try:
            found[str(pin)] = version(pin.name)
        except PackageNotFoundError:
            continue
    assert len(found) > 10
    wrong = {pin: got for pin, got in found.items() if not Requirement(pin).specifier.contains(got, prereleases=True)}
    assert wrong == {}, "these differ from constraints.txt; run make install, or change the pin"


def test_pins_are_within_the_ranges_that_users_get() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    ranges = [Requirement(line) for group in groups for line in group if not line.startswith("eyespot[")]
    allowed: dict[str, list[Requirement]] = {}
    for requirement in ranges:
        allowed.setdefault(canonical(requirement.name), []).append(requirement)
    for pin in pins():
        (one,) = pin.specifier
        for requirement in allowed.get(canonical(pin.name), []):
            if one.operator == "==" and not one.version.endswith("*"):
                assert requirement.specifier.contains(one.version), f"{pin} is outside of {requirement}"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- Docker, GitHub, make -----------------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", MAKE, re.MULTILINE))


def test_every_target_says_what_it_does() -> None:
    (phony,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKE, re.MULTILINE)
    assert set(phony.replace("\\", " ").split()) == targets()
    helped = set(re.findall(r"^([a-z-]+):.*## \S", MAKE, re.MULTILINE))
    assert helped == targets() >= {"build", "serve", "export", "plan", "docker", "pipeline", "space", "test", "demo"}


def test_verbs_and_extras_of_make_exist() -> None:
    for verb in re.findall(r"\$\(BIN\)/eyespot (\w+)", MAKE):
        assert verb in cli.VERBS, verb
    extras = set(re.findall(r"\$\(VENV\)/\.with-(\w+)", MAKE))
    extras |= {name for group in re.findall(r"--editable \"\.\[([\w,]+)\]\"", MAKE) for name in group.split(",")}
    assert extras and extras <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_call_make(file: Path) -> None:
    jobs = yaml.safe_load(file.read_text())["jobs"]
    called = {word for job in jobs.values() for step in job["steps"] for word in made(step.get("run", ""))}
    assert called and called <= targets()
    for job in jobs.values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]), "pinned to a commit"
            assert "${{" not in step.get("run", ""), "what others choose does not become part of a command"


def made(command: str) -> list[str]:
    return re.findall(r"\bmake ([a-z-]+)", command)


def test_the_workflows_are_those_that_were_promised() -> None:
    assert {file.stem for file in WORKFLOWS} == {"ci", "build", "release", "deploy-space"}
    tried = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    (range_,) = (Requirement(line) for line in PROJECT["dependencies"] if line.startswith("transformers"))
    oldest = min(str(one) for one in range_.specifier if one.operator == ">=").removeprefix(">=")
    assert {one["transformers"] for one in tried} == {"", f"=={oldest}.*", "<6"}
    assert {one["python"] for one in tried} == {"3.11", "3.12"}


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, words) of a Dockerfile, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_what_the_image_is_made_of_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [w.split()[:-1] for kind, w in instructions("Dockerfile") if kind == "COPY" and "--from" not in w]
    for name in {name.removeprefix("./") for names in copied for name in names}:
        assert (ROOT / name).exists() and f"!{name}" in ignored, name
    assert ignored[1] == "*", "all else, secrets too, stays outside"


def test_the_image_serves_as_a_user_without_rights_and_is_watched() -> None:
    found = instructions("Dockerfile")
    last = found[max(i for i, (kind, _) in enumerate(found) if kind == "FROM") :]
    words = dict(last)
    assert words["USER"].isdecimal() and int(words["USER"]) > 0
    assert [kind for kind, _ in last].index("USER") < [kind for kind, _ in last].index("ENTRYPOINT")
    served = cli.parser().parse_args(json.loads(words["CMD"]))
    assert json.loads(words["ENTRYPOINT"]) == ["eyespot"] and (served.verb, served.host) == ("serve", "0.0.0.0")
    assert str(served.port) == words["EXPOSE"] and f"127.0.0.1:{served.port}/health" in words["HEALTHCHECK"]
    check = json.loads(words["HEALTHCHECK"].split("CMD ")[1])
    compile(check[2], "healthcheck", "exec")
    bases = [w for kind, w in found if kind == "FROM" and w.startswith("python:")]
    assert len(bases) == 2 and len({w.split()[0] for w in bases}) == 1 and ":latest" not in "".join(bases)
    extras = [w.partition("=")[2] for kind, w in found if kind == "ARG" and w.startswith("EXTRAS")]
    assert extras and set(extras[0].split(",")) <= PROJECT["optional-dependencies"].keys()


def test_compose_runs_what_the_command_line_takes() -> None:
    services = read_yaml("compose.yaml")["services"]
    assert set(services) == {"server", "train", "mlflow"} and services["train"]["profiles"] == ["train"]
    environment = {"RECIPE": "smoke", "VARIANT": "cpu"}
    for name in ("server", "train"):
        text = [re.sub(r"\$\{(\w+):-\w+\}", lambda m: environment[m[1]], word) for word in services[name]["command"]]
        assert cli.parser().parse_args(text).verb == {"server": "serve", "train": "train"}[name]
        extras = services[name]["build"]["args"].get("EXTRAS", "serve")
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
        assert services[name]["cap_drop"] == ["ALL"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "nothing is open by default"
    assert "sqlite:////mlflow/" in services["mlflow"]["command"]
    for name, service in read_yaml("compose.cuda.yaml")["services"].items():
        assert name in services and service["deploy"]["resources"]["reservations"]["devices"]


def test_names_from_others_are_no_part_of_a_command(tmp_path: Path) -> None:
    shown = tmp_path / "eyespot"
    shown.write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\n')
    shown.chmod(0o755)
    environment = {
        **os.environ, "REPO": "a/b; touch hacked", "QUESTIONS": "format=x $(shell touch hacked) `touch hacked` *",
        "MODEL": "runs/model",
    }  # fmt: skip
    (tmp_path / ".venv").mkdir()
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    for copy in (tmp_path, tmp_path / ".venv" / ".constraints"):
        shutil.copy2(ROOT / "constraints.txt", copy)
    for order, file in enumerate((".installed", ".with-serve")):  # make thinks that all is installed
        (tmp_path / ".venv" / file).touch()
        os.utime(tmp_path / ".venv" / file, (2e9 + order, 2e9 + order))
    for target, words in (
        ("download", ["download", "a/b; touch hacked", "--out", "runs/model"]),
        ("space", ["push", "runs/model", "a/b; touch hacked", *environment["QUESTIONS"].split(), "--space"]),
    ):
        command = ["make", "--silent", "--file", str(ROOT / "Makefile"), target, f"BIN={tmp_path}"]
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.splitlines() == [f"[{word}]" for word in words]
        assert not (tmp_path / "hacked").exists()


def test_the_extra_of_the_pipeline_names_recipes_data_and_plots() -> None:
    """That it is enough was seen by hand (docs/pipeline.md): here everything is installed anyway."""
    extras = PROJECT["optional-dependencies"]
    assert set(Requirement(extras["pipeline"][0]).extras) >= {"quickstart", "scenes", "train", "pictures"}
