"""Features from the disk, beside encoding: 256 pictures of easy-VQA through the quickstart's frozen encoder.

    python benchmarks/features.py [result.json]

Reading is timed from a fresh look at the folder on; the files are in the operating system's memory by then.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from harness import compare, finish

from eyespot.compose import build_from_settings
from eyespot.data import sources
from eyespot.data.features import FeatureStore, fill
from eyespot.training.run import compose_settings

PICTURES, BATCH = 256, 32


def main() -> None:
    model, processor = build_from_settings(compose_settings(["recipe=quickstart"]).model)
    samples, _ = sources.load("easy_vqa", split="train")
    pictures = list(dict.fromkeys(image for sample in samples for image in sample.images))[:PICTURES]

    @torch.no_grad()
    def encode() -> list[torch.Tensor]:
        return [
            model.encode_images(processor.pixel_values(pictures[start : start + BATCH]))
            for start in range(0, PICTURES, BATCH)
        ]

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        root = Path(folder)
        fill(FeatureStore(root / "read"), pictures, processor, model.encode_images, limit_bytes=1e9)

        def read() -> list[torch.Tensor]:
            store = FeatureStore(root / "read")
            return [
                torch.stack([store[picture] for picture in pictures[start : start + BATCH]])
                for start in range(0, PICTURES, BATCH)
            ]

        for a, b in zip(encode(), read(), strict=True):
            torch.testing.assert_close(a, b)
        runs = iter(range(100))

        def write() -> None:
            store = FeatureStore(root / str(next(runs)))
            fill(store, pictures, processor, model.encode_images, limit_bytes=1e9, batch_size=BATCH)

        rows = [
            compare(f"{PICTURES} pictures: encode / read", encode, read, repeats=5),
            compare(f"{PICTURES} pictures: encode / encode and write", encode, write, repeats=5),
        ]
    finish(rows)


if __name__ == "__main__":
    main()
