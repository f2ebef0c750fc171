"""Weights in four bits: refused where they cannot be, loaded as QLoRA says, saved unpacked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eyespot
from eyespot import compose
from eyespot.config import ConfigError
from eyespot.models import nf4
from eyespot.models.language import pretrained
from eyespot.models.parameters import count_parameters
from eyespot.training.run import compose_settings, train
from tiny import close

pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 2, "alpha": 4, "targets": "attention"}


def parts(clip: Path, llama: Path, **language: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    source = {"name": "pretrained", "args": {"source": str(llama)}, "template": "plain", "train": "lora", "lora": LORA}
    return {"name": "pretrained", "args": {"source": str(clip)}}, {"name": "mlp"}, {**source, **language}


@pytest.mark.parametrize(
    ("cuda", "package", "words"),
    [
        (False, True, "quantize is nf4, which needs a CUDA GPU, and there is none here; drop model.language.quantize"),
        (True, False, r'run: pip install "eyespot[qlora]" (bitsandbytes)'),
    ],
)
def test_refused_before_any_weight_is_read(
    cuda: bool, package: bool, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    known = {"bitsandbytes": object() if package else None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known[name] if name in known else find_spec(name))
    with pytest.raises(ConfigError) as caught:  # neither folder exists
        eyespot.build(*parts(tmp_path / "clip", tmp_path / "llama", quantize="nf4"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ({"train": "full", "lora": None}, "quantize is nf4 but model.language.train is full"),
        ({"dtype": "float32"}, "quantize is nf4 but model.language.dtype is float32"),
        ({"name": "gguf", "args": {}}, "only pretrained models are loaded in four bits"),
        ({"quantize": "int4"}, "model.language.quantize is 'int4'; choose one of: nf4"),
        ({"args": {"source": "x", "quantize": "nf4"}}, "takes no argument 'quantize'"),
    ],
)
def test_settings_that_cannot_be(language: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        eyespot.build(*parts(tmp_path, tmp_path, **{"quantize": "nf4", **language}))
    assert words in str(caught.value)


def test_what_transformers_is_told(
    monkeypatch: pytest.MonkeyPatch, llama_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """NF4 with double quantization, computing in bfloat16 (arXiv 2305.14314, sections 3 and 5), all on one device."""
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "bitsandbytes" else version(name))
    monkeypatch.setattr(compose, "check_nf4", lambda: None)
    told: dict[str, Any] = {}

    class Told(Exception):
        pass

    def from_pretrained(source: str, **arguments: Any) -> None:
        told.update(arguments, source=source)
        raise Told

    monkeypatch.setattr(pretrained.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(Told):
        eyespot.build(*parts(clip_folder, llama_folder, quantize="nf4", dtype="bfloat16"))
    settings = told["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4" and settings.bnb_4bit_use_double_quant
    assert settings.bnb_4bit_compute_dtype == told["dtype"] == torch.bfloat16 and list(told["device_map"]) == [""]
    assert told["source"] == str(llama_folder)


# --- where bitsandbytes is installed, its CPU kernels do the rest ------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(compose, "check_nf4", lambda: None)


@pytest.mark.usefixtures("on_cpu")
def test_packed_counted_saved_and_loaded(llama_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    packed, processor = eyespot.build(*parts(clip_folder, llama_folder, quantize="nf4", dtype="bfloat16"))
    whole, _ = eyespot.build(*parts(clip_folder, llama_folder, dtype="bfloat16"))
    assert nf4.is_nf4(packed) and not nf4.is_nf4(whole)
    for mine, plain in zip(count_parameters(packed), count_parameters(whole), strict=True):
        assert (mine.total, mine.trainable) == (plain.total, plain.trainable), mine.part
    assert count_parameters(packed)[2].num_bytes < count_parameters(whole)[2].num_bytes
    for name, parameter in packed.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    eyespot.save(packed, processor, tmp_path)
    loaded = eyespot.load(tmp_path, device="cpu", dtype="auto").model
    batch = processor.prompt_batch(
        [([Image.new("RGB", (9, 9), "red")], [{"role": "user", "content": [{"type": "image"}]}])]
    )
    with torch.no_grad():
        expected, found = packed.eval()(**batch).logits.float(), loaded(**batch).logits
    real = torch.isfinite(expected)
    assert float((found - expected)[real].abs().max()) < 0.05 * float(expected[real].abs().max())
    unpacked = nf4.unpacked_state_dict(packed)
    for name, tensor in loaded.state_dict().items():
        close(tensor.float(), unpacked[name].float(), 0)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


@pytest.mark.usefixtures("on_cpu")
def test_a_run_trains_adapters_and_its_checkpoints_load(tmp_path: Path) -> None:
    settings = compose_settings(
        ["recipe=gemma270m_llava", "+shrink=true", f"output_dir={tmp_path}", "model.language.quantize=nf4",
         "model.language.dtype=bfloat16", "trainer.max_steps=3"]
    )  # fmt: skip
    run = train(settings)
    assert run.finished and run.assistant is not None and nf4.is_nf4(run.assistant.model)
    last = sorted((run.folder / "checkpoints").iterdir())[-1]
    final, checkpoint = (eyespot.load(path, device="cpu").model for path in (run.model_folder, last))
    one, other = nf4.unpacked_state_dict(checkpoint), final.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        close(one[name].float(), tensor.float(), 0)
