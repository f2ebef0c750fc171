"""Fixtures that many tests share. The tiny parts themselves are in tiny.py, beside this file."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import CLIPImageProcessorPil

from eyespot.devices import BFLOAT16
from eyespot.models.vlm import VLM
from tiny import IMAGE_SIZE, LANGUAGES, make_vlm, save_language, vision_encoder, write_gguf

os.environ[BFLOAT16] = "0"  # the same numbers on every processor; tests of bfloat16 ask for it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Trainings first: they take longest, and a worker that begins one last keeps the other waiting."""
    items.sort(key=lambda item: item.path.parent.name != "training")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or written to the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EYESPOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def left_behind() -> Iterator[None]:
    """What gradio leaves to the garbage collector (event loops and their sockets) goes here, and not in the middle of a
    test that it would fail."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="session", params=list(LANGUAGES))
def vlm(request: pytest.FixtureRequest) -> VLM:
    """A tiny VLM around each kind of language model; tests read it and never change it."""
    return make_vlm(request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with untied head and a byte tokenizer, as transformers saves them."""
    return save_language("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 with tied head."""
    return save_language("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP vision tower with its image processor."""
    folder = tmp_path_factory.mktemp("clip")
    vision_encoder("clip").save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer as a GGUF file, unquantised."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path
