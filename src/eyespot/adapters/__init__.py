"""eyespot models under the evaluation harnesses of others, one module each; nothing else in eyespot imports them."""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """What lmms-eval reads from this package's entry point in the group ``lmms_eval.models``: the name of the model and
    the class behind it, which is imported when somebody asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="eyespot", simple_class_path="eyespot.adapters.lmms_eval.Eyespot")
