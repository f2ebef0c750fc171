"""eyespot as a column of the peers' benchmark: the same parts, batches and losses, in the harness of the peers.

    export PEERS_CACHE=<folder that the harness's prepare.py filled>
    python benchmarks/peers.py HARNESS check [--out loss.json]
    python benchmarks/peers.py HARNESS run --out run.json

``check`` compares the first loss with that of transformers' LlavaForConditionalGeneration (column P2) on the same
weights. ``run`` times P0 and P2 beside eyespot, each in its own process, and writes what the harness's report.py reads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
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

    def packed(self, batch: Batch) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Rows of the batch, pairs about one picture behind one image prefix; and the pictures in their order."""
        samples = []
        for s in batch.samples:
            prompt = [BOS, *[IMG] * N_PATCH, *s.prompt_ids]
            labels = [IGNORE_INDEX] * len(prompt) + s.answer_ids
            samples.append((Encoded(prompt + s.answer_ids, labels, 1), [s.image], s.image))
        return pack(fill_rows(share_prefixes(samples, IMG, ROW_LENGTH), ROW_LENGTH), PAD)

    def loss(self, batch: Batch, features: torch.Tensor | None = None) -> torch.Tensor:
        columns, images = self.packed(batch)
        pictures = {"pixel_values": batch.pixels[images]} if features is None else {"image_features": features[images]}
        with self.autocast():
            loss: torch.Tensor = self.model(**columns, **pictures).loss
        return loss

    def train_step(self, batch: Batch, features: torch.Tensor | None = None) -> float:
        self.model.train()
        loss = self.loss(batch, features)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

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
            own = float(ours.loss(batch))
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
    arguments.add_argument("what", choices=["check", "run"])
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--work", nargs="+", default=["T1"], choices=["T1", "T2"], help="what to check")
    arguments.add_argument("--columns", nargs="+", default=["p0_seed0", "p2_llava", "eyespot_column"])
    arguments.add_argument("--peer-tasks", default="T1:1,G1:1,G2:1,G3:1")
    arguments.add_argument("--own-tasks", default="T1:2,T2:1,T3:1,G1:1,G2:1,G3:1")
    given = arguments.parse_args()
    if given.what == "check":
        check(given.work, given.out)
    else:
        run(given.harness, given.out, given.columns, given.peer_tasks, given.own_tasks)


if __name__ == "__main__":
    main()
