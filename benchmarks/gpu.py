"""Two full-size models with random weights on one GPU: samples a second, peak memory, share of the bfloat16 ceiling.

    python benchmarks/gpu.py [--out result.json]          # needs torch, transformers, peft and safetensors
    python benchmarks/gpu.py --tiny                       # the same road on any machine, with toy sizes, in seconds

Model A: frozen CLIP ViT-L/14, MLP, Gemma-3-270M with LoRA on all projections, 256 image and 150 text tokens a sample.
Model C: ViT-B/16, MLP, GPT of 12 layers, everything trained, 196 image and 60 text tokens. "naive" computes logits for
every position, encodes every picture in every step and runs unfused; each row adds one switch to the row before it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, Gemma3TextConfig

from eyespot.models.compiling import compile_layers
from eyespot.models.language.gpt import EyespotGPTConfig
from eyespot.models.loss import IGNORE_INDEX
from eyespot.models.vision.vit import EyespotViTConfig
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.training.optim import adamw

BATCHES = (1, 8, 16, 32, 64, 128)
SAMPLES_A = 3 * 157_712  # three epochs of the source's instruction data
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Work:
    """What one sample is: K image tokens, so many words, the last `labelled` of them supervised."""

    name: str
    config: VLMConfig
    modes: dict[str, str]
    image_tokens: int
    text_tokens: int
    labelled: int


def model_a(tiny: bool) -> Work:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    words = {"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        words = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    side = 28 if tiny else 224
    config = VLMConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=side, patch_size=14),
        text_config=Gemma3TextConfig(**words, **heads, tie_word_embeddings=True),
        connector={"name": "mlp"},
        image_token_id=words["vocab_size"],
        num_prefix_tokens=1,
        num_image_tokens=(side // 14) ** 2,
        lora={"language": {"r": 64, "alpha": 128, "targets": "all"}},
        tie_word_embeddings=True,
    )
    modes = {"vision": "frozen", "connector": "full", "language": "lora"}
    return Work("A: CLIP ViT-L/14 + Gemma-3-270M LoRA", config, modes, config.num_image_tokens, 150, 75)


def model_c(tiny: bool) -> Work:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} if tiny else {}
    vision = EyespotViTConfig(**small, **({"image_size": 32, "patch_size": 16} if tiny else {}))
    text = EyespotGPTConfig(**small, **({"vocab_size": 512} if tiny else {}))
    patches = (vision.image_size // vision.patch_size) ** 2
    config = VLMConfig(
        vision_config=vision, text_config=text, connector={"name": "mlp"}, image_token_id=text.vocab_size,
        num_image_tokens=patches, tie_word_embeddings=bool(text.tie_word_embeddings),
    )  # fmt: skip
    modes = {"vision": "full", "connector": "full", "language": "full"}
    return Work("C: ViT-B/16 + GPT of 12 layers, all trained", config, modes, patches, 60, 30)


def batch_of(work: Work, size: int) -> dict[str, torch.Tensor]:
    """Random pixels and words, all rows equally long."""
    generator = torch.Generator().manual_seed(size)
    vocabulary = work.config.text_config.vocab_size
    text = torch.randint(10, vocabulary, (size, work.text_tokens), generator=generator)
    picture = torch.full((size, work.image_tokens), work.config.image_token_id)
    ids = torch.cat([text[:, :1], picture, text[:, 1:]], dim=1)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -work.labelled :] = ids[:, -work.labelled :]
    side = work.config.vision_config.image_size
    pixels = torch.randn(size, 3, side, side, generator=generator)
    return {name: t.to(DEVICE) for name, t in (("input_ids", ids), ("labels", labels), ("pixel_values", pixels))}


def everywhere(model: VLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits in float32 for every position, as transformers' own loss computes them."""
    labels = batch["labels"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def where_labelled(model: VLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def ceiling() -> float:
    """The best rate of one large bfloat16 product, FLOP/s."""
    size = 8192 if DEVICE.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(12))


def seconds(work: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def flops_per_sample(work: Work, batch: dict[str, torch.Tensor], encode: bool) -> float:
    """What the maths needs (2 x multiply-adds), counted by torch on one sample; labelled positions only."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(work)
    one = {name: t[:1] for name, t in batch.items()}
    if not encode:
        with torch.no_grad():
            one["image_features"] = model.encode_images(one.pop("pixel_values"))
    with FlopCounterMode(display=False) as counter:
        where_labelled(model, one).backward()
    return float(counter.get_total_flops())


def build(work: Work) -> VLM:
    torch.manual_seed(0)
    with DEVICE:
        model = VLM(work.config)
    model.set_trainable(**work.modes)  # type: ignore[arg-type]
    for part in ("vision", "connector", "language"):
        if work.modes[part] == "frozen":
            getattr(model, part).to(torch.bfloat16)
    return model.train()


def measure(work: Work, size: int, loss: Any, *, compiled: bool, cached: bool, checkpointing: bool = False,
            repeats: int = 5) -> dict[str, Any]:  # fmt: skip
    """Median seconds of a step after warm-up, and the peak of what torch allocated."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(work)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if compiled:
        compile_layers(model)
    optimizer = adamw(model, {"vision": 1e-4, "connector": 1e-3, "language": 2e-4}, 0.01, (0.9, 0.999), 1e-8)
    batch = batch_of(work, size)
    bfloat16 = torch.autocast(DEVICE.type, dtype=torch.bfloat16) if DEVICE.type == "cuda" else nullcontext()
    if cached:
        with torch.no_grad(), bfloat16:
            batch["image_features"] = model.encode_images(batch.pop("pixel_values"))

    def step() -> None:
        with bfloat16:
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    median = statistics.median(seconds(step) for _ in range(repeats))
    peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None
    return {"batch": size, "step_s": median, "samples_per_s": size / median, "peak_gb": peak}


SWITCHES = {
    "naive": {"loss": everywhere, "compiled": False, "cached": False},
    "+ loss where a label stands": {"loss": where_labelled, "compiled": False, "cached": False},
    "+ compiled layers": {"loss": where_labelled, "compiled": True, "cached": False},
    "+ cached features": {"loss": where_labelled, "compiled": True, "cached": True},
    "+ gradient checkpointing": {"loss": where_labelled, "compiled": True, "cached": True, "checkpointing": True},
}


def rows_of(work: Work, batches: tuple[int, ...], top: float, may_compile: bool) -> list[dict[str, Any]]:
    rows = []
    flops = {encode: flops_per_sample(work, batch_of(work, 1), encode) for encode in (True, False)}
    for name, switches in SWITCHES.items():
        switches = {**switches, "compiled": switches["compiled"] and may_compile}
        if switches["cached"] and work.modes["vision"] != "frozen":
            if "checkpointing" not in switches:
                continue
            switches = {**switches, "cached": False}
        for size in batches:
            torch.compiler.reset()
            try:
                row = measure(work, size, **switches)  # type: ignore[arg-type]
            except torch.cuda.OutOfMemoryError:
                row = {"batch": size, "out_of_memory": True}
            else:
                row["share_of_ceiling"] = row["samples_per_s"] * flops[not switches["cached"]] / top
            rows.append({"model": work.name, "switches": name, **row})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tiny", action="store_true")
    arguments.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    arguments.add_argument("--models", default="AC")
    arguments.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    if DEVICE.type != "cuda" and not given.tiny:
        raise SystemExit("no CUDA GPU here; --tiny runs the same road with toy sizes")
    torch.backends.cuda.matmul.allow_tf32 = True
    top = ceiling()
    rows = []
    for letter, make in (("A", model_a), ("C", model_c)):
        if letter in given.models:
            rows += rows_of(make(given.tiny), tuple(given.batches), top, not given.no_compile)
    fastest = max(
        (row["samples_per_s"] for row in rows if row["model"][0] == "A" and "samples_per_s" in row), default=0
    )
    if fastest and not given.tiny:
        print(f"model A, {SAMPLES_A:,} samples: {SAMPLES_A / fastest / 60:.1f} minutes at {fastest:.0f} samples/s")
    report = {
        "command": "python benchmarks/gpu.py" + " --tiny" * given.tiny,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine(),
        "ceiling_bf16_tflops": top / 1e12,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "peft")}},
        "rows": rows,
    }
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
