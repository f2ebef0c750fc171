"""Exact name -> factory. Registering a part is one line; unknown names are errors that list the choices."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Any


def closest(name: str, choices: list[str]) -> str:
    """Words for an error message: ``"; did you mean 'x'?"`` or nothing."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry:
    """Factories of one kind by exact name.

    A factory is a callable or the text ``"module:attribute"``, imported when it is first asked for, so that listing
    the names costs no import.
    """

    def __init__(self, kind: str, factories: dict[str, str | Callable[..., Any]] | None = None) -> None:
        self.kind = kind
        self._factories: dict[str, str | Callable[..., Any]] = {}
        for name, factory in (factories or {}).items():
            self.register(name, factory)

    def register(self, name: str, factory: str | Callable[..., Any]) -> None:
        """Add a factory. Raises ValueError if the name is taken."""
        if name in self._factories:
            raise ValueError(f"{self.kind} {name!r} is registered already; choose another name")
        self._factories[name] = factory

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._factories:
            names = self.names()
            raise ValueError(f"unknown {self.kind} {name!r}{closest(name, names)} (choices: {', '.join(names)})")
        factory = self._factories[name]
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            factory = getattr(importlib.import_module(module), attribute)
            self._factories[name] = factory
        return factory

    def load_all(self) -> None:
        """Import every part, so that its configuration class is known to transformers."""
        for name in self.names():
            self[name]

    def names(self) -> list[str]:
        return sorted(self._factories)

    def __contains__(self, name: str) -> bool:
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


VISION = Registry(
    "vision encoder",
    {
        "pretrained": "eyespot.models.vision.pretrained:load_vision",
        "efficientnet_lite": "eyespot.models.vision.efficientnet_lite:build_efficientnet_lite",
        "vit": "eyespot.models.vision.vit:build_vit",
        "convnet": "eyespot.models.vision.convnet:build_convnet",
        "fusion": "eyespot.models.vision.fusion:build_fusion",
    },
)
CONNECTORS = Registry(
    "connector",
    {
        "linear": "eyespot.models.connectors.linear:LinearConnector",
        "mlp": "eyespot.models.connectors.mlp:MLPConnector",
        "conv": "eyespot.models.connectors.conv:ConvConnector",
        "pixel_shuffle": "eyespot.models.connectors.pixel_shuffle:PixelShuffleConnector",
        "perceiver": "eyespot.models.connectors.perceiver:PerceiverConnector",
        "qformer": "eyespot.models.connectors.qformer:QFormerConnector",
    },
)
LANGUAGES = Registry(
    "language model",
    {
        "pretrained": "eyespot.models.language.pretrained:load_language",
        "gguf": "eyespot.models.language.gguf:load_gguf",
        "gpt": "eyespot.models.language.gpt:build_gpt",
    },
)
FORMATS = Registry(
    "data format",
    {
        "easy_vqa": "eyespot.data.formats.easy_vqa:read_easy_vqa",
        "llava": "eyespot.data.formats.llava:read_llava",
        "captions": "eyespot.data.formats.captions:read_captions",
        "vqa": "eyespot.data.formats.vqa:read_vqa",
        "scenes": "eyespot.data.formats.scenes:read_scenes",
        "detection": "eyespot.data.formats.detection:read_detection",
    },
)
BENCHMARKS = Registry(
    "benchmark",
    {
        "vqav2": "eyespot.evaluation.benchmarks.vqav2:Vqav2",
        "pope": "eyespot.evaluation.benchmarks.pope:Pope",
        "captions": "eyespot.evaluation.benchmarks.captions:Captions",
        "chair": "eyespot.evaluation.benchmarks.chair:Chair",
        "choice": "eyespot.evaluation.benchmarks.choice:Choice",
        "spatial": "eyespot.evaluation.benchmarks.spatial:Spatial",
        "counting": "eyespot.evaluation.benchmarks.counting:Counting",
        "grounding": "eyespot.evaluation.benchmarks.grounding:Grounding",
        "retrieval": "eyespot.evaluation.benchmarks.retrieval:RetrievalBenchmark",
    },
)
FILTERS = Registry(
    "data filter",
    {
        "text_length": "eyespot.data.filters:TextLength",
        "language": "eyespot.data.filters:Language",
        "readable_images": "eyespot.data.filters:ReadableImages",
        "image_size": "eyespot.data.filters:ImageSize",
        "duplicate_images": "eyespot.data.filters:DuplicateImages",
        "duplicate_texts": "eyespot.data.filters:DuplicateTexts",
    },
)
AUGMENTATIONS = Registry(
    "augmentation",
    {
        "crop": "eyespot.processing.augment:Crop",
        "flip": "eyespot.processing.augment:Flip",
        "color": "eyespot.processing.augment:Color",
        "hue": "eyespot.processing.augment:Hue",
    },
)
EXPORTS = Registry(
    "export format",
    {
        "merged": "eyespot.export.merged:export_merged",
        "llava": "eyespot.export.llava:export_llava",
        "onnx": "eyespot.export.onnx:export_onnx",
        "gguf": "eyespot.export.gguf:export_gguf",
        "gguf_f32": "eyespot.export.gguf:export_gguf_f32",
        "gguf_q8_0": "eyespot.export.gguf:export_gguf_q8_0",
        "gguf_text": "eyespot.export.gguf:export_gguf_text",
        "torch_export": "eyespot.export.torch_program:export_torch_program",
    },
)
IMPORTS = Registry(
    "import format",
    {
        "llava": "eyespot.importing.llava:import_llava",
        "nanovlm": "eyespot.importing.nanovlm:import_nanovlm",
        "lightning": "eyespot.importing.lightning:import_lightning",
    },
)
