"""Three graphs under onnxruntime: equal logits and words, rows of unequal length, and a program without torch."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from eyespot.export import run_onnx
from eyespot.export.merged import without_adapters
from eyespot.export.onnx import (
    cache_sizes,
    check_installed,
    decoder_program,
    export_onnx,
    prompt_facts,
)
from eyespot.export.parity import ExportError, drawn_pictures, export_model
from eyespot.inference import Assistant, user_turn
from eyespot.models.merge import positions_from_mask
from tiny import close

FAMILIES: dict[str, dict[str, Any]] = {
    "vit-gpt": {"connector": {"name": "pixel_shuffle"}, "image_mode": "prefix", "language": {"template": "raw"}},
    "clip-llama": {"vision": {"keep_cls": True}},
    "clip-qwen3": {"connector": {"name": "perceiver"}},
    "siglip-gemma3": {"image_attention": "bidirectional", "vision": {"positions": 2}, "lora": True},
}
ALONE = """
import json, sys
blocked = ("eyespot", "torch", "transformers", "onnx", "onnxscript")
sys.modules.update(dict.fromkeys(blocked))  # as if they were not installed
sys.path.insert(0, sys.argv[1])
import run
model = run.Model(sys.argv[1])
print(json.dumps([model.ask(run.open_rgb(file), "What is in this picture?", 12) for file in sys.argv[2:]]))
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_decoder(name: str, assistant_of: Callable[..., Assistant]) -> None:
    """Three rows padded on the left in two passes: the logits of each are those of our model."""
    assistant = assistant_of(*name.split("-"), **FAMILIES[name])
    model = without_adapters(assistant.model)
    decoder = decoder_program(model).module(check_guards=False)  # ONNX has none
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 9, model.language_dim, generator=generator)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, *[1] * 8], [1] * 9])
    is_image = torch.zeros(3, 9, dtype=torch.int64)
    ahead = torch.zeros_like(is_image)
    if assistant.model.config.image_attention == "bidirectional":
        assistant.model.config.num_image_tokens = 3
        is_image[:, 3:6], ahead[:, 3:6] = 1, torch.tensor([2, 1, 0])
    with torch.inference_mode():
        wanted = assistant.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions_from_mask(mask),
            mm_token_type_ids=is_image,
        ).logits
    past = [torch.zeros(3, heads, 0, width) for heads, width in cache_sizes(model) for _ in "kv"]
    for start, stop in ((0, 7), (7, 9)):
        looks = ahead[:, start:stop] if is_image.any() else None
        logits, *past = decoder(embeds[:, start:stop], mask[:, :stop], looks, *past)
        close(logits, wanted[:, stop - 1, : logits.shape[-1]], 1e-4)


@pytest.mark.parametrize("name", FAMILIES if os.environ.get("EYESPOT_SLOW_TESTS") == "1" else ["siglip-gemma3"])
def test_onnx(name: str, assistant_of: Callable[..., Assistant], tmp_path: Path) -> None:
    assistant = assistant_of(*name.split("-"), **FAMILIES[name])
    found = export_model(assistant, "onnx", tmp_path / "out")
    assert found.largest_difference < 1e-4
    assert len({row.answer for row in found.pictures}) > 1  # a model that ignores pictures would prove nothing
    runs_alone(tmp_path / "out", [row.answer for row in found.pictures])
    tied = assistant.model.language.config.tie_word_embeddings
    assert (tmp_path / "out" / "embed.onnx.data").exists() is not tied  # one matrix, stored once


def runs_alone(folder: Path, wanted: list[str]) -> None:
    """run.py of the folder in a process in which neither eyespot nor torch can be imported."""
    files = []
    for i, (_, picture) in enumerate(drawn_pictures()):
        files.append(str(folder / f"{i}.png"))
        picture.save(files[-1])
    command = [sys.executable, "-I", "-c", ALONE, str(folder), *files]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == wanted


def test_prompt(assistant_of: Callable[..., Assistant]) -> None:
    """Ids around a question, and a question that spells a special token stays words."""
    assistant = assistant_of("vit", "gpt")
    processor = assistant.processor
    facts = prompt_facts(assistant.model, processor)
    for question in ("q", "Say <eos>  now"):
        words = processor.tokenizer(question, add_special_tokens=False, split_special_tokens=True).input_ids
        wanted = processor.encode_prompt(user_turn([None], question)).input_ids
        assert facts["before_question"] + words + facts["after_question"] == wanted
    assert facts["max_tokens"] == 128 and facts["end_token_ids"] == [processor.tokenizer.eos_token_id]


def test_a_typed_token_of_the_template_stays_words(assistant_of: Callable[..., Assistant]) -> None:
    """Also one that the tokenizer does not mark as special, as Qwen 3's <think>."""
    assistant = assistant_of("vit", "gpt")
    processor = assistant.processor
    processor.tokenizer.add_tokens(["<other>", "<think>"])  # the first one has the placeholder's id
    processor.chat_template = processor.chat_template.replace("Assistant:", "<think>Assistant:")
    assert "<think>" in processor.chat_template
    model = object.__new__(run_onnx.Model)
    model.facts = json.loads(json.dumps(prompt_facts(assistant.model, processor)))
    model.tokenizer = copy.deepcopy(processor.tokenizer.backend_tokenizer)
    model.tokenizer.encode_special_tokens = True
    for question in ("why <think>?", "<think><think>", "<eos> no"):
        wanted = processor.encode_prompt(user_turn([None], question)).input_ids
        assert model.prompt(question).tolist() == [wanted]
        assert wanted.count(processor.tokenizer.convert_tokens_to_ids("<think>")) == 1


def test_a_question_that_is_written_twice_is_refused(assistant_of: Callable[..., Assistant]) -> None:
    assistant = assistant_of("vit", "gpt")
    assistant.processor.encode_prompt = lambda messages: type("Row", (), {"input_ids": [1, 2]})()
    with pytest.raises(ExportError, match="its chat template writes a question 0 times"):
        prompt_facts(assistant.model, assistant.processor)


def test_flex_attention_is_refused(assistant_of: Callable[..., Assistant], tmp_path: Path) -> None:
    assistant = assistant_of("clip", "llama")
    assistant.model.language.config._attn_implementation = "flex_attention"
    with pytest.raises(ExportError, match="attention of llama takes no mask of all pairs"):
        export_onnx(assistant, tmp_path)


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package onnx; pip install 'eyespot\[onnx\]'"):
        check_installed()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_are_opened_as_ours(mode: str, tmp_path: Path) -> None:
    from eyespot.processing.images import open_image

    picture = PIL.Image.new("RGBA", (8, 6), (200, 30, 30, 90)).convert(mode)
    picture.getexif()[0x0112] = 6  # lying on its side
    picture.save(tmp_path / "p.png", exif=picture.getexif())
    assert run_onnx.open_rgb(tmp_path / "p.png").tobytes() == open_image(tmp_path / "p.png").tobytes()


def test_grey_of_16_bits_is_no_white(tmp_path: Path) -> None:
    from eyespot.processing.images import open_image

    PIL.Image.fromarray(np.linspace(0, 65_535, 48).astype(np.uint16).reshape(6, 8)).save(tmp_path / "p.png")
    found = run_onnx.open_rgb(tmp_path / "p.png")
    assert found.tobytes() == open_image(tmp_path / "p.png").tobytes() and found.getpixel((4, 2)) < (140, 140, 140)
