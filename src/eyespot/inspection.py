"""Look at data, batches and models before spending time on training."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.text import Text
from torch import Tensor

from eyespot.compose import build_from_settings, load_parts
from eyespot.config import TrainSettings
from eyespot.data.collate import Collator
from eyespot.data.sample import Sample
from eyespot.models.parameters import parameter_table
from eyespot.models.stages import shape_text, stages
from eyespot.processing.images import open_image
from eyespot.processing.processor import IGNORE_INDEX, Encoded, Processor
from eyespot.training.run import compose_settings, load_data, make_augmenter, with_tokenizer


def marked_prompt(encoded: Encoded, processor: Processor) -> Text:
    """The decoded row: what is learned is green and bold, image runs are shown by their length."""
    text = Text()
    ids, labels = encoded.input_ids, encoded.labels
    start = 0
    while start < len(ids):
        is_image, learned = ids[start] == processor.image_token_id, labels[start] != IGNORE_INDEX
        end = start
        while end < len(ids) and (ids[end] == processor.image_token_id, labels[end] != IGNORE_INDEX) == (
            is_image,
            learned,
        ):
            end += 1
        if is_image:
            text.append(f"<image x {end - start}>", style="magenta")
        else:
            text.append(processor.tokenizer.decode(ids[start:end]), style="bold green" if learned else "")
        start = end
    return text


def show_data(settings: TrainSettings, count: int, out: Path | None) -> None:
    """Print the first samples of a recipe as the model will read them; ``out`` gets a sheet of their pictures."""
    console = Console()
    samples, validation, report = load_data(settings.data, settings.trainer.seed)
    _, processor = build_from_settings(with_tokenizer(settings.model, samples))
    console.print(report.summary(), markup=False)
    console.print(f"{len(samples)} training and {len(validation)} validation samples; learned words are green")
    for sample in samples[:count]:
        encoded = processor.encode_conversation(sample.messages, settings.data.max_length)
        console.rule(f"{sample.id}: {encoded.num_images} images, {len(encoded.input_ids)} tokens, "
                     f"{encoded.num_supervised} supervised", align="left")  # fmt: skip
        console.print(marked_prompt(encoded, processor))
    if out is not None:
        contact_sheet(samples[:count]).save(out)
        console.print(f"pictures: {out}", markup=False)


def show_batch(settings: TrainSettings, count: int, out: Path | None) -> None:
    """Print the shape after every stage for one training batch of ``count`` units, and how full its rows are."""
    from eyespot.data.datamodule import Units  # with Lightning, which looking at a model needs not

    console = Console()
    samples, _, _ = load_data(settings.data, settings.trainer.seed)
    model, processor = build_from_settings(with_tokenizer(settings.model, samples))
    data = settings.data
    units = Units(samples, data.share if data.packing else 1, settings.trainer.seed, make_augmenter(data))
    chosen = [units[(0, index)] for index in range(min(count, len(units)))]
    collator = Collator(processor, 1, data.max_length, data.row_length if data.packing else None)
    window = collator(chosen)
    batch = window.batches[0]
    for name, tensor in batch.items():
        console.print(f"{name:18} {shape_text(tensor)}", markup=False)
    for name, shape in stages(model, batch):
        console.print(f"{name:18} {shape}", markup=False)
    real = batch["documents"] >= 0 if "documents" in batch else batch["attention_mask"] == 1
    console.print(
        f"{len(window.ids)} samples, {window.num_supervised} supervised tokens, {window.num_tokens} tokens alone, "
        f"{int(real.sum())} in rows with shared prefixes, rows {float(real.float().mean()):.0%} full"
    )
    if out is not None:
        contact_sheet([sample for unit in chosen for sample in unit]).save(out)
        console.print(f"pictures: {out}", markup=False)


def show_model(target: Sequence[str], out: Path | None) -> None:
    """Print the parts of a model (a folder, or a recipe's), their parameters, and the shapes that one picture takes."""
    console = Console()
    if len(target) == 1 and "=" not in target[0]:
        model, processor = load_parts(target[0])
    else:
        settings = compose_settings(target)
        if (settings.model.language.tokenizer or "").startswith("bpe:"):
            samples, _, _ = load_data(settings.data, settings.trainer.seed)
            settings.model = with_tokenizer(settings.model, samples)
        model, processor = build_from_settings(settings.model)
    for part in ("vision", "connector", "language"):
        console.print(f"{part:10} {type(getattr(model, part)).__name__}", markup=False)
    console.print(parameter_table(model))
    size = processor.pixel_values([Image.new("RGB", (64, 64), "gray")])
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "gray"},
    ]
    batch: dict[str, Tensor] = {
        **processor.pad([processor.encode_conversation(messages)], "right"),
        "pixel_values": size,
    }
    for name, shape in [("pixel_values", shape_text(size)), *stages(model, batch)]:
        console.print(f"{name:18} {shape}", markup=False)
    console.print(f"prompt: {processor.apply_chat_template(messages[:1], add_generation_prompt=True)!r}", markup=False)
    if out is not None:
        raise ValueError("inspect model draws no picture; drop --out")


def contact_sheet(samples: Sequence[Sample], columns: int = 4, size: int = 240) -> Image.Image:
    """Pictures with the last words of their conversation below them."""
    font = ImageFont.load_default(15)
    height, margin = size + 84, 12
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (size + margin) + margin, rows * (height + margin) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i, sample in enumerate(samples):
        left, top = margin + i % columns * (size + margin), margin + i // columns * (height + margin)
        if sample.images:
            picture = open_image(sample.images[0])
            scale = size / max(picture.size)
            picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
            sheet.paste(picture, (left, top))
        words = [
            part["text"] for message in sample.messages[-2:] for part in message["content"] if part["type"] == "text"
        ]
        lines = [line for text in words for line in textwrap.wrap(text, 32)][:4]
        draw.multiline_text((left, top + size + 6), "\n".join(lines), fill="black", font=font)
    return sheet
