"""What the loader delivers, in batches a second: pictures opened and resized, beside features from the disk.

    python benchmarks/loader.py [result.json]

Photographs of 640 x 480 pixels (JPEG, noise) for an encoder of 224 pixels, 24 questions on 8 pictures a batch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import compare, finish
from PIL import Image

from eyespot.compose import build
from eyespot.data.collate import Collator
from eyespot.data.datamodule import VLMDataModule
from eyespot.data.features import FeatureStore, fill
from eyespot.data.sample import Sample

PICTURES, SHARE = 64, 3


def main() -> None:
    sizes = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    model, processor = build(
        {"name": "vit", "args": {"image_size": 224, "patch_size": 16, **sizes}},
        {"name": "mlp"},
        {"name": "gpt", "args": {"max_position_embeddings": 512, **sizes}, "train": "full"},
    )
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        for number in range(PICTURES):
            path = str(Path(folder) / f"{number}.jpg")
            coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            coarse.resize((640, 480)).save(path, quality=90)
            samples += [Sample.question(f"{number}-{q}", path, f"what is number {q}?", "noise") for q in range(SHARE)]
        store = FeatureStore(Path(folder) / "features")
        with torch.no_grad():
            fill(store, [image for s in samples for image in s.images], processor, model.encode_images, limit_bytes=1e9)

        def epoch(features: FeatureStore | None, workers: int) -> None:
            collator = Collator(processor, row_length=512, features=features)
            data = VLMDataModule(samples, [], collator, batch_size=24, share=SHARE, num_workers=workers)
            assert sum(len(window.ids) for window in data.train_dataloader()) == len(samples)

        rows = [
            compare(f"{len(samples)} samples: pictures / features", lambda: epoch(None, 0), lambda: epoch(store, 0)),
            compare(f"{len(samples)} samples: in the main process / 2 workers", lambda: epoch(None, 0),
                    lambda: epoch(None, 2)),
        ]  # fmt: skip
        for row in rows:
            row["samples_per_s"] = [len(samples) / row["naive_s"], len(samples) / row["ours_s"]]
            print(f"{row['name']}: {row['samples_per_s'][0]:.0f} and {row['samples_per_s'][1]:.0f} samples/s")
    finish(rows)


if __name__ == "__main__":
    main()
