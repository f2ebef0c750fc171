"""Pictures that tests draw, with captions that are true of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square")


def draw_captions(folder: Path, number: int = 24) -> Path:
    """So many pictures of one shape each and a file of captions, two for each picture; twelve kinds repeat.

    Returns:
        captions.jsonl, for ``format=captions``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    rows = []
    for i in range(number):
        color, shape = COLORS[i % 6], SHAPES[i // 6 % 2]
        image = Image.new("RGB", (32, 32), (90 + i, 100, 110))
        left, top = rng.randint(0, 10), rng.randint(0, 10)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "circle" else pen.rectangle)((left, top, left + 20, top + 20), fill=color)
        image.save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "captions": [f"a {color} {shape}", f"one {shape}, {color}"]})
    file = folder / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
