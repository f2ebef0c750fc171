"""A whole training step of the quickstart with everything on, beside what its parts would cost without.

    python benchmarks/step.py [result.json]

24 questions on 8 pictures. "plain" is a padded row and an encoded picture for each question, adapters as peft computes
them, float32 logits for every position, an unfused optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import compare, finish
from peft.tuners.lora import Linear

from eyespot.compose import build_from_settings
from eyespot.data import sources
from eyespot.data.collate import Collator
from eyespot.data.sample import Sample
from eyespot.models.lora_linear import LoRALinear
from eyespot.models.loss import IGNORE_INDEX
from eyespot.models.vlm import VLM
from eyespot.training.optim import adamw
from eyespot.training.run import compose_settings

PICTURES, SHARE = 8, 3
Batch = dict[str, torch.Tensor]


def everywhere(model: VLM, batch: Batch) -> torch.Tensor:
    labels = batch["labels"]
    logits = model(**{name: values for name, values in batch.items() if name != "labels"}).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def where_labelled(model: VLM, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def step(model: VLM, batch: Batch, loss: Callable[[VLM, Batch], torch.Tensor], optimizer: Any) -> Callable[[], float]:
    trainable = [p for p in model.parameters() if p.requires_grad]

    def work() -> float:
        value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return work


def main() -> None:
    ours, processor = build_from_settings(compose_settings(["recipe=quickstart"]).model)
    naive = copy.deepcopy(ours)
    for layer in naive.modules():
        if isinstance(layer, LoRALinear):
            layer.__class__ = Linear
    samples, _ = sources.load("easy_vqa", split="train")
    by_picture: dict[str, list[Sample]] = {}
    for sample in samples:
        by_picture.setdefault(sample.group, []).append(sample)
    chosen = [s for questions in list(by_picture.values())[:PICTURES] for s in questions[:SHARE]]
    [padded] = Collator(processor)([chosen]).batches
    [packed] = Collator(processor, row_length=256)([chosen]).batches
    cached = dict(packed)
    with torch.no_grad():
        cached["image_features"] = ours.encode_images(cached.pop("pixel_values"))
    rates = {"vision": 0.0, "connector": 1e-5, "language": 1e-5}
    for model in (ours, naive):
        model.train()
    plain = torch.optim.AdamW([p for p in naive.parameters() if p.requires_grad], lr=1e-5, foreach=False)
    fused = adamw(ours, rates, 0.01, (0.9, 0.999), 1e-8)
    first = [float(everywhere(naive, padded).detach()), float(where_labelled(ours, cached).detach())]
    print("first loss:", first)
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-4)
    slow = step(naive, padded, everywhere, plain)
    rows = [
        compare("plain / loss where a label stands", slow, step(naive, padded, where_labelled, plain), repeats=3),
        compare(
            "plain / and packed behind shared pictures", slow, step(naive, packed, where_labelled, plain), repeats=3
        ),
        compare("plain / and adapters in one operation", slow, step(ours, packed, where_labelled, fused), repeats=3),
        compare("plain / and features from the cache", slow, step(ours, cached, where_labelled, fused), repeats=3),
    ]
    finish(rows)


if __name__ == "__main__":
    main()
