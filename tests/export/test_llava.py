"""LLaVA of transformers: equal logits and words, equal prompts, and a reason for what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from eyespot.export import llava
from eyespot.export.llava import MARK, check_fits, check_prompts, llava_processor, with_rows
from eyespot.export.parity import ExportError, drawn_pictures, export_model
from eyespot.inference import Assistant
from tiny import WIDTH

MODELS: dict[str, dict[str, Any]] = {
    "clip-llama": {"lora": True},
    "siglip-gemma3": {"connector": {"name": "mlp", "args": {"hidden_dim": 20, "dropout": 0.1}}},
    "clip-qwen3": {"vision": {"layer": -2}},
    "siglip-qwen2": {"vision": {"layer": -1}},
    "clip-gpt2": {"vision": {"keep_cls": True}},
}
CHATML = (
    "{% if think %}{{ think }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TRANSFORMERS = """
import json, sys
sys.modules["eyespot"] = None  # as if it were not installed
import PIL.Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, pictures = sys.argv[1], sys.argv[2:]
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
answers = []
for picture in pictures:
    question = {"type": "text", "text": "What is in this picture?"}
    content = [{"type": "image", "image": PIL.Image.open(picture)}, question]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answers.append(processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
assert not [name for name in sys.modules if name.startswith("eyespot.")]
print(json.dumps(answers))
"""


@pytest.mark.parametrize("name", MODELS)
def test_llava(name: str, assistant_of: Callable[..., Assistant], tmp_path: Path) -> None:
    assistant = assistant_of(*name.split("-"), **MODELS[name])
    found = export_model(assistant, "llava", tmp_path / "out")
    assert found.largest_difference < 1e-4
    assert len({row.answer for row in found.pictures}) > 1  # a model that ignores pictures would prove nothing
    assert not assistant.model.config.lora or any("lora_A" in name for name in assistant.model.state_dict())


def test_plain_transformers(assistant_of: Callable[..., Assistant], tmp_path: Path) -> None:
    assistant = assistant_of("clip", "llama", lora=True)
    wanted = [row.answer for row in export_model(assistant, "llava", tmp_path / "out").pictures]
    files = []
    for i, (_, picture) in enumerate(drawn_pictures()):
        files.append(str(tmp_path / f"{i}.png"))
        picture.save(files[-1])
    command = [sys.executable, "-I", "-c", PLAIN_TRANSFORMERS, str(tmp_path / "out"), *files]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == wanted


BIDIRECTIONAL = {"image_attention": "bidirectional"}
PREFIX = {"image_mode": "prefix", "language": {"template": "raw"}}


@pytest.mark.parametrize(
    ("encoder", "decoder", "settings", "reason"),
    [
        ("vit", "llama", {}, "its vision encoder is eyespot_vit, and LLaVA takes CLIP or SigLIP; export it as onnx"),
        ("dinov2", "llama", {}, "its vision encoder is dinov2"),
        ("clip", "gpt", {}, "its language model eyespot_gpt is eyespot's own"),
        ("clip", "gemma2", {}, "gemma2 scales, caps or shifts its logits"),
        ("clip", "llama", {"connector": {"name": "conv"}}, "its connector is conv, and LLaVA has two linear layers"),
        ("clip", "llama", {"connector": {"name": "mlp"}}, f"is 64 wide inside, and LLaVA as wide as the text, {WIDTH}"),
        ("clip", "llama", {"connector": {"name": "mlp", "args": {"depth": 3}}}, "is not two linear layers with GELU"),
        ("clip", "llama", {"connector": {"name": "mlp", "args": {"norm": True}}}, "is not two linear layers with GELU"),
        ("clip", "llama", {"connector": {"name": "mlp", "args": {"factor": 2}}}, f"args.hidden_dim={WIDTH}"),
        ("clip", "llama", BIDIRECTIONAL, "its image tokens see each other"),
        ("clip", "llama", PREFIX, "all pictures stand before all words"),
        ("clip", "llama", {"vision": {"positions": 2}}, "its patches are told their places"),
    ],
)
def test_refused(
    encoder: str, decoder: str, settings: dict[str, Any], reason: str, assistant_of: Callable[..., Assistant]
) -> None:
    assistant = assistant_of(encoder, decoder, **settings)
    with pytest.raises(ExportError, match=f"cannot be exported as llava: .*{reason}"):
        check_fits(assistant.model, assistant.processor)


@pytest.mark.parametrize("template", ["plain", "raw", CHATML, "{{ bos_token }}" + CHATML])
def test_prompts(template: str, assistant_of: Callable[..., Assistant], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"template": template, "template_kwargs": {"think": "it's so"} if "think" in template else {}}
    assistant = assistant_of("clip", "gemma3", language=settings)
    processor = assistant.processor
    assert processor.add_bos
    check_prompts(processor, llava_processor(assistant.model, processor))
    if template == "plain":  # "Human: " and what follows would become one token
        monkeypatch.setattr(llava, "CONTENT_TO_TEXT", llava.CONTENT_TO_TEXT.replace(MARK, ""))
        with pytest.raises(ExportError, match="joins words that training kept apart"):
            check_prompts(processor, llava_processor(assistant.model, processor))


def test_text_content_and_several_pictures(assistant_of: Callable[..., Assistant]) -> None:
    """What vLLM hands over: content that is text, with the picture's mark in it; and pictures between words."""
    assistant = assistant_of("clip", "llama")
    ours, theirs = assistant.processor, llava_processor(assistant.model, assistant.processor)
    text = theirs.apply_chat_template([{"role": "user", "content": "hm?"}], add_generation_prompt=True)
    assert text == f"Human: {MARK}hm?{MARK}\nAssistant:"
    pictures = [PIL.Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    image, words = [{"type": "image", "image": p} for p in pictures], {"type": "text", "text": "then"}
    messages = [{"role": "user", "content": [image[0], words, image[1], words]}]
    encoded = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    wanted = ours.encode_prompt(messages).input_ids
    assert encoded["input_ids"][0] == [theirs.image_token_id if i == ours.image_token_id else i for i in wanted]


def test_a_new_row_is_never_said() -> None:
    weight = torch.randn(7, 5)
    grown = with_rows(weight, 9)
    logits = torch.randn(1000, 5) @ grown.T
    assert torch.equal(grown[:7], weight) and bool((logits[:, 7:].max(1).values < logits[:, :7].max(1).values).all())
    assert with_rows(weight, 7) is weight
