"""eyespot as a column of the peers' benchmark: the same parts, batches and losses, in the harness of the peers.

    export PEERS_CACHE=<folder that the harness's prepare.py filled>
    python benchmarks/peers.py HARNESS check [--out loss.json]
    python benchmarks/peers.py HARNESS run --out run.json
    python benchmarks/peers.py HARNESS profile --out profile.json

``check`` compares the first loss with that of transformers' LlavaForConditionalGeneration (column P2) on the same
weights. ``run`` times P0 and P2 beside eyespot, each in its own process, and writes what the harness's report.py reads.
``profile`` says where eyespot's own time goes in each work: matrix products and the rate they reach, beside what one
large product reaches on the machine in the same minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from eyespot.branching import greedy
from eyespot.data.features import FeatureStore, picture_digest
from eyespot.data.packing import fill_rows, pack, share_prefixes
from eyespot.devices import has_fast_bfloat16
from eyespot.models.language.pretrained import load_language
from eyespot.models.lora_linear import folded
from eyespot.models.vision.pretrained import load_vision, token_counts
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.processor import IGNORE_INDEX, Encoded
from eyespot.training.optim import adamw

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])  # the harness; in its own processes it is there already
from adapter import Batch, Ctx, PeerAdapter
from workload import BOS, IMG, N_PATCH, PAD

ROW_LENGTH = 512
PICTURES = 2  # in a micro-batch of a training step: the gradient is that of the whole batch, the memory that of a part
LORA = {"r": 64, "alpha": 128, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


class Adapter(PeerAdapter):
    """CLIP ViT-L/14, MLP of two layers, Gemma-3-270M with LoRA, as in the other columns."""

    name = "eyespot"

    def setup(self, ctx: Ctx, hidden_dim: int | None = None, vision_layer: int | None = None) -> None:
        torch.manual_seed(0)
        self.fast = has_fast_bfloat16(torch.device("cpu"))
        dtype = torch.bfloat16 if self.fast else torch.float32
        vision = load_vision(ctx.vision_dir, dtype)
        language, _ = load_language(ctx.lm_dir, dtype)
        config = VLMConfig(
            vision_config=vision.config,
            text_config=language.config,
            connector={"name": "mlp", "depth": 2, "hidden_dim": hidden_dim},
            image_token_id=IMG,
            vision_layer=vision_layer,
            num_prefix_tokens=token_counts(vision.config)[0],
            num_image_tokens=N_PATCH,
            lora={"language": LORA},
        )
        self.model = VLM(config, vision=vision, language=language)
        self.model.set_trainable(vision="frozen", connector="full", language="lora")
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = PAD
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        rates = {"vision": 0.0, "connector": 1e-3, "language": 2e-4}
        self.optimizer = adamw(self.model, rates, 0.01, (0.9, 0.999), 1e-8)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.fast)

    def packed(self, parts: list[Any]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Rows of some samples, pairs about one picture behind one image prefix; and the pictures in their order."""
        samples = []
        for s in parts:
            prompt = [BOS, *[IMG] * N_PATCH, *s.prompt_ids]
            labels = [IGNORE_INDEX] * len(prompt) + s.answer_ids
            samples.append((Encoded(prompt + s.answer_ids, labels, 1), [s.image], s.image))
        return pack(fill_rows(share_prefixes(samples, IMG, ROW_LENGTH), ROW_LENGTH), PAD)

    def losses(self, batch: Batch, features: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The loss of the batch as a sum over micro-batches of a few pictures."""
        for first in range(0, len(batch.pixels), PICTURES):
            part = [s for s in batch.samples if first <= s.image < first + PICTURES]
            columns, images = self.packed(part)
            pictures = {"pixel_values": batch.pixels} if features is None else {"image_features": features}
            pictures = {name: tensor[images] for name, tensor in pictures.items()}
            with self.autocast():
                loss: torch.Tensor = self.model(**columns, **pictures, num_items_in_batch=batch.supervised).loss
            yield loss

    def train_step(self, batch: Batch, features: torch.Tensor | None = None) -> float:
        self.model.train()
        total = 0.0
        for loss in self.losses(batch, features):
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def train_epochs(self, batches: list[Batch], epochs: int) -> float:
        """With the feature cache; filling it counts."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(Path(folder))
            for epoch in range(epochs):
                for batch in batches:
                    names = [key.encode() for key in batch.keys]
                    if epoch == 0:
                        with torch.no_grad(), self.autocast():
                            store.add([picture_digest(name) for name in names], self.model.encode_images(batch.pixels))
                    self.train_step(batch, torch.stack([store[name] for name in names]))
        return time.perf_counter() - start

    @torch.inference_mode()
    def encode(self, images: list[torch.Tensor]) -> torch.Tensor:
        with self.autocast():
            return self.model.encode_images(torch.stack(images))

    def answers(self, images: list[torch.Tensor], keys: list[int], prompts: list[list[int]], n: int) -> torch.Tensor:
        self.model.eval()
        rows = [[BOS, *[IMG] * N_PATCH, *prompt] for prompt in prompts]
        asked = [
            (Encoded(ids, [IGNORE_INDEX] * len(ids), 1), [image], key)
            for ids, image, key in zip(rows, images, keys, strict=True)
        ]
        with self.autocast():
            return torch.tensor(greedy(self.model, asked, self.encode, n, [], PAD))

    def generate(self, images: torch.Tensor, prompts: list[list[int]], max_new_tokens: int) -> torch.Tensor:
        return self.answers(list(images), list(range(len(images))), prompts, max_new_tokens)

    def ask_many(self, image: torch.Tensor, prompts: list[list[int]], max_new_tokens: int) -> torch.Tensor:
        with folded(self.model):
            return self.answers([image] * len(prompts), [0] * len(prompts), prompts, max_new_tokens)

    ask_many_batched = None  # the same as ask_many


def check(works: list[str], out: Path | None) -> None:
    """The first loss beside P2's, on equal weights."""
    from adapters.p2_llava import Adapter as Llava
    from workload import t1_batches, t2_batches

    context = Ctx.from_env()
    theirs = Llava()
    theirs.setup(context)
    projector = theirs.model.model.model.multi_modal_projector.modules_to_save.default
    ours = Adapter()
    ours.setup(context, hidden_dim=projector.linear_1.out_features, vision_layer=-2)
    for layer, source in zip(ours.model.connector.layers[::3], (projector.linear_1, projector.linear_2), strict=True):
        layer.weight.data.copy_(source.weight.data)
        layer.bias.data.copy_(source.bias.data)
    rows = []
    for name in works:
        [batch] = {"T1": t1_batches, "T2": t2_batches}[name](context.cache, 1)
        with torch.no_grad():
            own = sum(float(loss) for loss in ours.losses(batch))
        expected = reference(theirs, batch)  # not a step: that would change its weights
        rows.append({"work": name, "eyespot": own, "p2_llava": expected, "difference": own - expected})
        print(rows[-1], flush=True)
    if any(abs(row["difference"]) > 0.02 * row["p2_llava"] for row in rows):  # type: ignore[operator]
        raise SystemExit("the losses differ by more than bfloat16 explains")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def reference(llava: Any, batch: Batch) -> float:
    """P2's loss per supervised token of a batch, one sample after another."""
    total = 0.0
    for s in batch.samples:
        ids = torch.tensor([[BOS, *[IMG] * N_PATCH, *s.prompt_ids, *s.answer_ids]])
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[0, -len(s.answer_ids) :] = torch.tensor(s.answer_ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = llava.model(input_ids=ids, pixel_values=batch.pixels[s.image : s.image + 1], labels=labels)
        total += float(out.loss) * len(s.answer_ids)
    return total / batch.supervised


KINDS = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "aten::bmm",
        "aten::baddbmm",
        "mkldnn",
        "_convolution",
    ),
    "attention": ("scaled_dot_product", "_flash_attention"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index", "aten::gather", "aten::clone", "aten::fill_"),
}


def kind_of(operation: str) -> str:
    return next((kind for kind, names in KINDS.items() if any(name in operation for name in names)), "everything else")


def profile_of(call: Callable[[], object]) -> dict[str, Any]:
    """Seconds by kind of operation of one call, after a first one."""
    from torch.profiler import profile

    call()
    with profile(with_flops=True) as recorded:
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
    seconds: dict[str, float] = dict.fromkeys([*KINDS, "everything else"], 0.0)
    flops = 0
    for event in recorded.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        flops += event.flops if kind_of(event.key) == "matrix products" else 0
    products = seconds["matrix products"]
    return {"wall_s": wall, **seconds, "gflops_in_products": flops / products / 1e9}


def profile_works(out: Path | None) -> None:
    """Where the time goes: T1, T2, a step of T3 with features at hand, and answers of one token and of nine."""
    from workload import gen_inputs, t1_batches, t2_batches

    context = Ctx.from_env()
    ours = Adapter()
    ours.setup(context)
    [one], [shared] = t1_batches(context.cache, 1), t2_batches(context.cache, 1)
    features = ours.encode(list(one.pixels)).clone()
    picture, prompt = gen_inputs(context.cache, 1)
    pictures, prompts = gen_inputs(context.cache, 8)
    works: dict[str, Callable[[], object]] = {
        "T1": lambda: ours.train_step(one),
        "T2": lambda: ours.train_step(shared),
        "T3, a step": lambda: ours.train_step(one, features),
        "G1, first token": lambda: ours.generate(picture, prompt, 1),
        "G1, nine tokens": lambda: ours.generate(picture, prompt, 9),
        "G2, first tokens": lambda: ours.generate(pictures, prompts, 1),
        "G2, nine tokens": lambda: ours.generate(pictures, prompts, 9),
    }
    left, right = torch.randn(2048, 1024), torch.randn(1024, 4096)
    rows = []
    for name, call in works.items():
        product = min(elapsed(lambda: left @ right) for _ in range(5))
        rows.append({"work": name, "one_product_gflops": 2 * 2048 * 1024 * 4096 / product / 1e9, **profile_of(call)})
        print(
            {key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True
        )
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def elapsed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run(harness: Path, out: Path, columns: list[str], peer_tasks: str, own_tasks: str) -> None:
    """Each column in a process of its own, started by the harness's worker; rows already in the file stay."""
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in harness.glob("*.py"):
            (copy / path.name).symlink_to(path.resolve())
        (copy / "adapters").mkdir()
        for path in (harness / "adapters").glob("*.py"):
            (copy / "adapters" / path.name).symlink_to(path.resolve())
        (copy / "adapters" / "eyespot_column.py").write_text("from peers import Adapter\n", encoding="utf-8")
        # not the resolved path of worker.py: it puts its own folder first
        environment = {**os.environ, "PYTHONPATH": f"{copy}:{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
        code = f"import sys; sys.path.insert(0, {str(copy)!r}); import worker; worker.main()"
        for peer in columns:
            tasks = own_tasks if peer == "eyespot_column" else peer_tasks
            result = copy / f"{peer}.json"
            print(f"{peer}: {tasks}", flush=True)
            subprocess.run(
                [sys.executable, "-c", code, peer, tasks, str(result)], env=environment, cwd=copy, check=True
            )
            row = json.loads(result.read_text(encoding="utf-8"))
            rows.append({**row, "round": 0, "tasks": tasks})
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print({task: error[-300:] for task, error in row["errors"].items()} or "done", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("harness", type=Path)
    arguments.add_argument("what", choices=["check", "run", "profile"])
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--work", nargs="+", default=["T1"], choices=["T1", "T2"], help="what to check")
    arguments.add_argument("--columns", nargs="+", default=["p0_seed0", "p2_llava", "eyespot_column"])
    arguments.add_argument("--peer-tasks", default="T1:1,G1:1,G2:1,G3:1")
    arguments.add_argument("--own-tasks", default="T1:2,T2:1,T3:1,G1:1,G2:1,G3:1")
    given = arguments.parse_args()
    if given.what == "check":
        check(given.work, given.out)
    elif given.what == "profile":
        profile_works(given.out)
    else:
        run(given.harness, given.out, given.columns, given.peer_tasks, given.own_tasks)


if __name__ == "__main__":
    main()
