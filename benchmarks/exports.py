"""Size and speed of a model in every export format.

python benchmarks/exports.py [FILE [MODEL ...]]

Each MODEL is a folder that training wrote. Beside them stands a SigLIP with a Llama, small, which fits every format
and is taught what the pictures show, because the words of a random model are as good as tied. A speed is that of ten
answers about drawn pictures by the program of the format, in turn with ours.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import finish
from transformers import LlamaConfig, LlamaForCausalLM, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from eyespot import build, load
from eyespot.export.gguf import QUESTIONS
from eyespot.export.parity import QUESTION, ExportError, check, drawn_pictures
from eyespot.inference import Assistant, user_turn
from eyespot.processing.tokenizers import byte_tokenizer
from eyespot.registry import EXPORTS

FORMATS = ["merged", "llava", "onnx", "torch_export", "gguf_f32", "gguf", "gguf_q8_0", "gguf_text"]
SIZE, WIDTH = 224, 384


def small_model(folder: Path) -> Assistant:
    """About 23 million parameters."""
    torch.manual_seed(0)
    wide: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    }
    SiglipVisionModel(SiglipVisionConfig(**wide, image_size=SIZE, patch_size=32)).save_pretrained(folder / "vision")
    SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder / "vision")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "language")
    ends: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaForCausalLM(LlamaConfig(**wide, **ends, vocab_size=len(tokenizer))).save_pretrained(folder / "language")
    parts = [{"name": "pretrained", "args": {"source": str(folder / part)}} for part in ("vision", "language")]
    connector = {"name": "mlp", "args": {"hidden_dim": WIDTH}}
    lora = {"train": "lora", "lora": {"r": 16, "alpha": 16}}
    model, processor = build(parts[0], connector, {**parts[1], **lora})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero in a new adapter, which would change nothing
            torch.nn.init.normal_(parameter, std=0.02)
    assistant = Assistant(model, processor, "cpu")
    teach(assistant)
    return assistant


def teach(assistant: Assistant, num_steps: int = 200) -> None:
    """What each drawn picture shows, and an answer to each question without one."""
    model, processor, pictures = assistant.model, assistant.processor, drawn_pictures()
    asked = [(user_turn([0], QUESTION), name.partition("(")[2].rstrip(")")) for name, _ in pictures]
    asked += [(user_turn([], question), f"That was question {number}.") for number, question in enumerate(QUESTIONS)]
    rows = [processor.encode_conversation([*turn, {"role": "assistant", "content": answer}]) for turn, answer in asked]
    batch = processor.pad(rows, "right")
    batch["pixel_values"] = processor.pixel_values([picture for _, picture in pictures])
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss, steps = 1.0, 0
    while loss > 0.01 and steps < num_steps:
        optimizer.zero_grad()
        output = model(**batch).loss
        output.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss, steps = output.item(), steps + 1
    print(f"taught for {steps} steps, loss {loss:.4f}", flush=True)
    model.eval().requires_grad_(False)
    assistant.forget()


def measure(name: str, assistant: Assistant, format: str) -> dict[str, Any]:
    """Export, compare, and time a second round of answers; or the reason why the format cannot hold the model."""
    row: dict[str, Any] = {"model": name, "format": format}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        try:
            consumer = EXPORTS[format](assistant, Path(folder))
        except ExportError as error:
            print(f"{name:12} {format:14} {error}", flush=True)
            return {**row, "refused": str(error)}
        row["export_s"] = time.perf_counter() - started
        row["size_mb"] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6
        check(assistant, consumer, format)
        found = check(assistant, consumer, format)
    row["largest_difference"] = found.largest_difference
    row["eyespot_s_per_answer"] = found.seconds_eyespot / len(found.pictures)
    row["exported_s_per_answer"] = found.seconds_exported / len(found.pictures)
    row["tokens_per_answer"] = sum(picture.num_tokens for picture in found.pictures) / len(found.pictures)
    print(
        f"{name:12} {format:14} {row['size_mb']:8.1f} MB  {row['exported_s_per_answer']:.3f} s per answer "
        f"(eyespot {row['eyespot_s_per_answer']:.3f})  logits within {found.largest_difference:.0e}",
        flush=True,
    )
    return row


def models() -> Iterator[tuple[str, Assistant]]:
    """One after the other, so that only one is in memory."""
    with tempfile.TemporaryDirectory() as folder:
        yield "siglip-llama", small_model(Path(folder))
    for model in sys.argv[2:]:
        yield Path(model).parent.name or model, load(model, "cpu", "float32")


def main() -> None:
    finish([measure(name, assistant, format) for name, assistant in models() for format in FORMATS])


if __name__ == "__main__":
    main()
