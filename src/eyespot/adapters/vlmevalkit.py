"""An eyespot model under VLMEvalKit 0.2rc1: ``python -m eyespot.adapters.vlmevalkit FOLDER --data POPE MMBench_DEV_EN``

The version is the one that the package ms-vlmeval 0.0.20 carries; VLMEvalKit itself is not in the package index.
Source: https://github.com/open-compass/VLMEvalKit (vlmeval/vlm/base.py, vlmeval/config.py, vlmeval/run.py)
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from eyespot.data.sample import ContentPart, image_part, text_part
from eyespot.inference import MAX_NEW_TOKENS, load

try:
    import vlmeval
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel
except ImportError as error:
    raise ImportError(
        f"VLMEvalKit cannot be imported ({error}); git clone https://github.com/open-compass/VLMEvalKit && "
        "pip install -e VLMEvalKit, or pip install ms-vlmeval==0.0.20"
    ) from error

NAME = "eyespot"


class Eyespot(BaseModel):  # type: ignore[misc]
    """A trained model that takes pictures and texts in any order, and conversations.

    Args:
        model_path: folder of the model. device, dtype, adapter: see ``eyespot.load``.
        max_new_tokens: limit of each answer.
        options: of ``Assistant.generate_text``; without any the answers are greedy.
    """

    INTERLEAVE = True
    allowed_types = ["text", "image"]  # the base class refuses others, such as video

    def __init__(
        self,
        model_path: str,
        device: str = "auto",
        dtype: str = "auto",
        adapter: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **options: Any,
    ) -> None:
        super().__init__()
        self.assistant = load(model_path, device, dtype, adapter)
        self.options = {"max_new_tokens": max_new_tokens, **options}
        self._folded = ExitStack()  # for as long as the model lives
        self._folded.enter_context(self.assistant.folded())

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to one message: ``{"type": "text" or "image", "value": words or path}`` in any order."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of several turns, ``{"role": ..., "content": as above}``."""
        images = [part["value"] for turn in message for part in turn["content"] if part["type"] == "image"]
        turns = [{"role": turn["role"], "content": [_part(part) for part in turn["content"]]} for turn in message]
        return self.assistant.generate_text([(images, turns)], **self.options)[0]


def _part(part: Mapping[str, str]) -> ContentPart:
    return image_part() if part["type"] == "image" else text_part(part["value"])


def register(folder: str, name: str = NAME, **options: Any) -> None:
    """Make VLMEvalKit know the model in ``folder`` by ``name``; it is loaded when the first question is asked.

    ``options`` are the further arguments of ``Eyespot``.
    """
    supported_VLM[name] = partial(Eyespot, folder, **options)


def main() -> None:
    """VLMEvalKit's run.py with a registered model."""
    parser = argparse.ArgumentParser(
        prog="python -m eyespot.adapters.vlmevalkit",
        description="Evaluate an eyespot model with VLMEvalKit. All other options are those of its run.py.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="of the model")
    parser.add_argument("--model", default=NAME, help="name of the model in the results (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="default: %(default)s")
    ours, theirs = parser.parse_known_args()
    register(ours.folder, ours.model, max_new_tokens=ours.max_new_tokens)
    packed = Path(vlmeval.__file__).with_name("run.py")
    script = str(packed if packed.exists() else packed.parents[1] / "run.py")  # a clone has it beside the package
    sys.argv = [script, "--model", ours.model, *theirs]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
