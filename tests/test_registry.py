"""Names to factories: exact, lazy, and with errors that list the choices."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

from eyespot.registry import CONNECTORS, FORMATS, LANGUAGES, VISION, Registry, closest

REGISTRIES = {registry.kind: registry for registry in (VISION, CONNECTORS, LANGUAGES, FORMATS)}
EVERY_NAME = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]


def make(value: int) -> int:
    return value + 1


def test_register_and_get() -> None:
    registry = Registry("thing", {"b": make})
    registry.register("a", make)
    assert registry["a"](1) == 2
    assert registry.names() == list(registry) == ["a", "b"]
    assert "a" in registry and "c" not in registry


def test_a_name_is_taken_once() -> None:
    registry = Registry("thing", {"a": make})
    with pytest.raises(ValueError, match="thing 'a' is registered already; choose another name"):
        registry.register("a", max)
    assert registry["a"] is make


def test_unknown_names_list_the_choices() -> None:
    registry = Registry("thing", {"linear": make, "mlp": make})
    with pytest.raises(
        ValueError, match=re.escape("unknown thing 'liner'; did you mean 'linear'? (choices: linear, mlp)")
    ):
        registry["liner"]
    with pytest.raises(ValueError, match=re.escape("unknown thing 'zzz' (choices: linear, mlp)")):
        registry["zzz"]


def test_names_are_exact() -> None:
    for name in ("MLP", "mlp ", "Mlp"):
        with pytest.raises(ValueError, match="unknown connector"):
            CONNECTORS[name]


def test_text_is_imported_when_asked_for() -> None:
    registry = Registry("thing", {"root": "math:sqrt", "broken": "no_such_module:x"})
    assert registry["root"](9) == 3
    with pytest.raises(ModuleNotFoundError):
        registry["broken"]


def test_closest() -> None:
    assert closest("mpl", ["mlp", "linear"]) == "; did you mean 'mlp'?"
    assert closest("zzz", ["mlp"]) == ""


@pytest.mark.parametrize(("kind", "name"), EVERY_NAME)
def test_every_registered_part_can_be_imported_and_is_documented(kind: str, name: str) -> None:
    factory = REGISTRIES[kind][name]
    assert callable(factory)
    assert inspect.getdoc(factory), f"{kind} {name!r} has no docstring"
    parameters = inspect.signature(factory).parameters.values()
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters), "**kwargs would swallow misspelt arguments"


def test_listing_names_imports_nothing() -> None:
    code = "import sys; from eyespot.registry import VISION; VISION.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
