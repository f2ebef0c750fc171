"""Questions asked one after another about one picture: keys and values of the picture kept, beside computed anew.

    python benchmarks/prefix.py [result.json]

The parts of the quickstart, untrained (so answers run to their limit), with 256 tokens for the picture. In both forms
the picture is encoded once, before; the naive form is what a loop over transformers' generate does then.
"""

from __future__ import annotations

from harness import compare, finish
from PIL import Image

from eyespot.compose import build_from_settings
from eyespot.inference import Assistant
from eyespot.training.run import compose_settings

QUESTIONS = ["what colour is the shape?", "is there a circle?", "what is the shape?", "is there no red shape?"]
NEW_TOKENS = 3


def main() -> None:
    overrides = ["recipe=quickstart", "model.vision.args.image_size=512", "model.connector.args={depth: 2, factor: 1}"]
    assistant = Assistant(*build_from_settings(compose_settings(overrides).model), "cpu")
    picture = Image.linear_gradient("L").convert("RGB")

    def ask(keep: bool) -> list[str]:
        answers = []
        for question in QUESTIONS:
            if not keep:
                assistant._prefixes.clear()
            answers.append(assistant.ask(picture, question, max_new_tokens=NEW_TOKENS))
        return answers

    if ask(True) != ask(False):
        raise SystemExit("the answers differ")
    tokens = assistant.model.config.num_image_tokens
    label = f"{len(QUESTIONS)} questions, one call each, on a picture of {tokens} tokens, {NEW_TOKENS} new tokens each"
    finish([compare(label, lambda: ask(False), lambda: ask(True), repeats=5)])


if __name__ == "__main__":
    main()
