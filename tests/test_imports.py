"""Who imports whom, what an import costs, and what works without the optional packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import eyespot

SOURCE = Path(eyespot.__file__).parent
# a module imports only from its own place or from further left; places in one tuple do not know each other
ORDER: list[tuple[str, ...]] = [
    ("registry", "devices", "files", "pictures"),
    ("config",),
    ("models", "processing"),
    ("compose",),
    ("data",),
    ("branching",),
    ("inference",),
    ("training",),
    ("evaluation", "inspection", "plan"),
    ("ray_jobs", "relevance", "adapters"),
    ("serving",),
    ("export", "importing"),
    ("cli",),
    ("__main__",),
]
RANK = {place: i for i, places in enumerate(ORDER) for place in places}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
# what only training, data sets, serving or shipping need
OPTIONAL = ["hydra", "omegaconf", "lightning", "pytorch_lightning", "tensorboard", "gradio", "fastapi", "datasets",
            "pyarrow", "pandas", "matplotlib", "gguf", "mlflow", "wandb", "torchvision", "easy_vqa",
            "py3langid", "ray", "snowballstemmer", "uvicorn", "prometheus_client"]  # fmt: skip


def place(path: Path) -> str:
    """models, data, ..., or the name of a module at the top."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(place that is imported, line) of every import of ours, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import; write eyespot.…"
            modules = [node.module or ""]
            if node.module == "eyespot":
                modules = [f"eyespot.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            first, _, rest = module.partition(".")
            if first == "eyespot":
                yield rest.partition(".")[0], node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_left(path: Path) -> None:
    here = place(path)
    if here == "configs":
        assert not list(imported(path))
        return
    assert here in RANK, f"add {here!r} to ORDER in this file, where it belongs"
    for there, line in imported(path):
        if there in eyespot.__all__ or there in (here, "", "__version__", "__file__"):
            continue  # a public name is loaded when it is used, from wherever it lives; the package itself is light
        assert RANK[there] < RANK[here], f"{path}:{line}: {here} imports {there}, which is not to its left"


def test_the_check_sees_imports() -> None:
    found = {there for path in FILES for there, _ in imported(path)}
    assert {"registry", "config", "models", "processing", "compose", "data"} <= found


def python(code: str) -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["eyespot", "eyespot.registry", "eyespot.config", "eyespot.cli"])
def test_light_modules_cost_no_torch(module: str) -> None:
    python(
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'lightning', 'hydra', 'numpy', 'PIL', 'peft', 'gradio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


@pytest.mark.parametrize("name", eyespot.__all__)
def test_public_names(name: str) -> None:
    value = getattr(eyespot, name)
    assert callable(value) and value.__doc__, f"eyespot.{name} has no docstring"
    assert value.__module__.startswith("eyespot."), value.__module__
    assert name in dir(eyespot)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'laod'; names: .*Assistant"):
        _ = eyespot.laod


# importlib takes None for a package that is not there
BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
ASK = """
import tempfile
import PIL.Image
import eyespot
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
model, processor = eyespot.build(
    {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
    {"name": "mlp"},
    {"name": "gpt", "args": {"max_position_embeddings": 96, **sizes}, "train": "lora",
     "lora": {"r": 2, "targets": "attention"}},
)
with tempfile.TemporaryDirectory() as folder:
    eyespot.save(model, processor, folder)
    assistant = eyespot.load(folder, device="cpu")
assert isinstance(assistant.ask(PIL.Image.new("RGB", (20, 20)), "hm?", max_new_tokens=2), str)
import eyespot.data.collate, eyespot.data.sources, eyespot.evaluation.runner
import eyespot.inspection, eyespot.relevance, eyespot.evaluation.pictures
"""


def test_the_core_works_without_the_optional_packages() -> None:
    python(BLOCK + ASK)


def test_the_server_needs_no_package_of_training() -> None:
    """As in an image that has the extra `serve` alone."""
    for name in (own := ("fastapi", "uvicorn", "prometheus_client", "gradio")):
        pytest.importorskip(name)
    blocked = [name for name in OPTIONAL if name not in (*own, "pandas")]  # pandas comes with gradio
    python(
        f"import sys, warnings\nsys.modules.update(dict.fromkeys({blocked!r}))\nwarnings.simplefilter('ignore')\n"
        "import importlib, pkgutil, eyespot.serving\n"
        "names = [module.name for module in pkgutil.iter_modules(eyespot.serving.__path__)]\n"
        "assert {'server', 'page', 'drawing'} <= set(names)\n"
        "for name in names: importlib.import_module(f'eyespot.serving.{name}')"
    )


@pytest.mark.parametrize("name", ["hydra", "lightning", "numpy"])
def test_the_block_is_real(name: str) -> None:
    python(
        f"{BLOCK}\ntry:\n    import {name}\nexcept ModuleNotFoundError:\n    found = False\nelse:\n    found = True\n"
        f"assert found is {name not in OPTIONAL}"
    )
