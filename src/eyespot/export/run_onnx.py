"""Ask the ONNX model in this folder about a picture; needs numpy, onnxruntime, tokenizers and Pillow only.

    python run.py photo.png "What is in this picture?"

Letters in shapes: T tokens of the prompt, S side of the picture, D width, V vocabulary.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


def open_rgb(path: str | Path) -> Image.Image:
    """A picture as a person sees it: upright, transparency on white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits, which Pillow would clip
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixel_values(image: Image.Image, facts: dict[str, Any]) -> NDArray[np.float32]:
    """An RGB picture -> float32 [1, 3, S, S], as ``facts`` (resize, size, ...) say."""
    pixels = np.asarray(resized(image, facts)) * np.float32(facts["rescale_factor"])  # [S, S, 3]
    normal = (pixels - np.float32(facts["image_mean"])) / np.float32(facts["image_std"])
    return normal.astype(np.float32).transpose(2, 0, 1)[None]


def resized(image: Image.Image, facts: dict[str, Any]) -> Image.Image:
    """To S x S: "squash" stretches, "crop" takes the middle, "pad" fills up with the mean colour."""
    size, (width, height), how = facts["size"], image.size, Image.Resampling(facts["resample"])
    if facts["resize"] == "squash":
        return image.resize((size, size), how)
    if facts["resize"] == "crop":
        side, shorter = facts["shorter_side"], min(width, height)
        scaled = (side * width // shorter, side * height // shorter)
        left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
        return image.resize(scaled, how).crop((left, top, left + size, top + size))
    longer = max(width, height)
    scaled = (max(1, round(size * width / longer)), max(1, round(size * height / longer)))
    red, green, blue = (round(mean / facts["rescale_factor"]) for mean in facts["image_mean"])
    square = Image.new("RGB", (size, size), (red, green, blue))
    square.paste(image.resize(scaled, how), ((size - scaled[0]) // 2, (size - scaled[1]) // 2))
    return square


class Model:
    """The three graphs, the tokenizer, and model.json, which says what they are for."""

    def __init__(self, folder: str | Path) -> None:
        import onnxruntime  # here, so that pictures can be prepared without it
        from tokenizers import Tokenizer

        folder = Path(folder)
        self.facts = json.loads((folder / "model.json").read_text())
        self.vision, self.embed, self.decoder = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("vision", "embed", "decoder")
        )
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # what a person types becomes no control token; see prompt()

    def prompt(self, question: str) -> NDArray[np.int64]:
        """int64 [1, T]: the template around the question, and a run of placeholders for the picture.

        Typed words that the template uses as one token, but that are not marked as special, are cut in two.
        """
        cuts = [match.start() + 1 for match in re.finditer(self.facts["cut_after_first_letter_of"], question)]
        pieces = [question[a:b] for a, b in zip([0, *cuts], [*cuts, len(question)], strict=True)]
        words = [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False).ids]
        return np.array([[*self.facts["before_question"], *words, *self.facts["after_question"]]], dtype=np.int64)

    def first_inputs(self, image: Image.Image, question: str) -> dict[str, NDArray[Any]]:
        """What the decoder reads first: words and picture as embeddings, and an empty cache."""
        ids = self.prompt(question)
        is_image = ids == self.facts["image_token_id"]
        (embeds,) = self.embed.run(None, {"input_ids": np.where(is_image, 0, ids)})  # [1, T, D]
        (image_embeds,) = self.vision.run(None, {"pixel_values": pixel_values(image, self.facts["picture"])})
        embeds[is_image] = image_embeds[0]
        inputs = {"inputs_embeds": embeds, "attention_mask": np.ones_like(ids)}
        if self.facts["image_tokens_see_each_other"]:  # each one as far as the end of its picture
            inputs["ahead"] = np.zeros_like(ids)
            inputs["ahead"][is_image] = np.arange(int(is_image.sum()))[::-1]
        for past in self.decoder.get_inputs():
            if past.name.startswith("past_"):  # [B, heads, 0, D / heads]
                inputs[past.name] = np.zeros((1, past.shape[1], 0, past.shape[3]), np.float32)
        return inputs

    def steps(
        self, image: Image.Image, question: str, max_new_tokens: int
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Greedily, each new token and the logits float32 [V] that it was taken from; the end token is the last one."""
        inputs = self.first_inputs(image, question)
        room = (self.facts["max_tokens"] or sys.maxsize) - inputs["attention_mask"].shape[1]
        for _ in range(min(max_new_tokens, room)):
            logits, *present = self.decoder.run(None, inputs)
            token = int(logits[0].argmax())
            yield token, logits[0]
            if token in self.facts["end_token_ids"]:
                return
            (embeds,) = self.embed.run(None, {"input_ids": np.array([[token]])})
            mask = np.pad(inputs["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
            cache = dict(zip((name for name in inputs if name.startswith("past_")), present, strict=True))
            ahead = {"ahead": np.zeros((1, 1), np.int64)} if "ahead" in inputs else {}
            inputs = {"inputs_embeds": embeds, "attention_mask": mask, **ahead, **cache}

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def ask(self, image: Image.Image, question: str, max_new_tokens: int = 64) -> str:
        """A greedy answer to a question about an RGB picture."""
        return self.decode([token for token, _ in self.steps(image, question, max_new_tokens)])


if __name__ == "__main__":
    print(Model(Path(__file__).parent).ask(open_rgb(sys.argv[1]), sys.argv[2]))
