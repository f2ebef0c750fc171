"""eyespot: build small vision-language models from parts, train them, prove that they look at the picture, ship them.

Importing this package costs no torch; a name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "Assistant": "eyespot.inference",
    "Processor": "eyespot.processing.processor",
    "Sample": "eyespot.data.sample",
    "VLM": "eyespot.models.vlm",
    "VLMConfig": "eyespot.models.vlm",
    "build": "eyespot.compose",
    "evaluate": "eyespot.evaluation.runner",
    "load": "eyespot.inference",
    "save": "eyespot.compose",
    "train": "eyespot.training.run",
}
__all__ = [
    "VLM",
    "Assistant",
    "Processor",
    "Sample",
    "VLMConfig",
    "build",
    "evaluate",
    "load",
    "save",
    "train",
]

if TYPE_CHECKING:
    from eyespot.compose import build, save
    from eyespot.data.sample import Sample
    from eyespot.evaluation.runner import evaluate
    from eyespot.inference import Assistant, load
    from eyespot.models.vlm import VLM, VLMConfig
    from eyespot.processing.processor import Processor
    from eyespot.training.run import train


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'eyespot' has no attribute {name!r}; names: {', '.join(sorted(_NAMES))}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__
