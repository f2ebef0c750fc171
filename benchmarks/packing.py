"""Rows without padding, and several questions behind one picture: forward and backward of the quickstart's parts.

    python benchmarks/packing.py [result.json]

All batches have 24 questions, and the pictures are encoded before the clock starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from harness import compare, finish

from eyespot.compose import build_from_settings
from eyespot.data import sources
from eyespot.data.collate import Collator
from eyespot.data.sample import Sample
from eyespot.training.run import compose_settings

QUESTIONS = 24


def main() -> None:
    model, processor = build_from_settings(compose_settings(["recipe=quickstart"]).model)
    model.train()
    samples, _ = sources.load("easy_vqa", split="train")
    by_picture: dict[str, list[Sample]] = {}
    for sample in samples:
        by_picture.setdefault(sample.group, []).append(sample)

    def step(chosen: Sequence[Sample], row_length: int | None) -> Callable[[], None]:
        [batch] = Collator(processor, row_length=row_length)([chosen]).batches
        with torch.no_grad():
            batch["image_features"] = model.encode_images(batch.pop("pixel_values"))
        print(f"{tuple(batch['input_ids'].shape)} tokens for {len(chosen)} questions")

        def work() -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        return work

    alone = [questions[0] for questions in by_picture.values()][:QUESTIONS]
    rows = [compare("padded rows / packed rows", step(alone, None), step(alone, 256))]
    for share in (2, 3, 6):
        shared = list(itertools.chain(*[q[:share] for q in by_picture.values() if len(q) >= share]))[:QUESTIONS]
        name = f"a picture each / {share} questions behind a picture"
        rows.append(compare(name, step(alone, 256), step(shared, 256)))
    finish(rows)


if __name__ == "__main__":
    main()
