"""A saved model in TRL: supervised fine-tuning with the loss of eyespot, adapters that load back, preferences."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eyespot
from eyespot.compose import load_parts
from eyespot.config import ConfigError
from eyespot.devices import BFLOAT16
from eyespot.inference import user_turn
from eyespot.training.preference import read_preferences, run_preference
from tiny import close, save_language

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

COLORS = ("red", "green", "blue", "purple")
TARGETS = r"language\..*\.(q_proj|v_proj)"
LORA = {"r": 2, "alpha": 4, "targets": "attention"}


def save_model(folder: Path, clip: Path, language: str = "llama", **settings: Any) -> Path:
    """A tiny CLIP, an MLP and a tiny language model as eyespot saves them."""
    source = str(save_language(language, folder / "language"))
    model, processor = eyespot.build(
        {"name": "pretrained", "args": {"source": str(clip)}},
        {"name": "mlp"},
        {"name": "pretrained", "args": {"source": source}, "template": "plain", "train": "full", **settings},
    )
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)  # adapters that were trained
    eyespot.save(model, processor, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    return save_model(tmp_path_factory.mktemp("saved"), clip_folder)


@pytest.fixture(scope="module")
def adapted_folder(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    return save_model(tmp_path_factory.mktemp("adapted"), clip_folder, train="lora", lora=LORA)


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (20, 20), color) for color in COLORS]


def talk(image: Any, color: str) -> list[dict[str, Any]]:
    return [*user_turn([image], "what color is it?"), {"role": "assistant", "content": color}]


def our_loss(folder: Path) -> float:
    """The loss of all four conversations in one batch, by eyespot."""
    model, processor = load_parts(folder, "float32")
    batch = processor.pad([processor.encode_conversation(talk(None, color)) for color in COLORS], "right")
    with torch.no_grad():
        return float(model(**batch, pixel_values=processor.pixel_values(pictures())).loss)


def messages() -> list[dict[str, Any]]:
    question = {"role": "user", "content": "what color is it?"}
    return [
        {"images": [image], "messages": [question, {"role": "assistant", "content": color}]}
        for image, color in zip(pictures(), COLORS, strict=True)
    ]


def prompts() -> list[dict[str, Any]]:
    return [
        {"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:]}
        for row in messages()
    ]


def sft(model: Any, rows: list[dict[str, Any]], out: Path, steps: int = 5, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = {key: options.pop(key) for key in list(options) if key == "assistant_only_loss"}
    arguments = SFTConfig(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        bf16=False, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, **config,
    )  # fmt: skip
    trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), **options)
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def adapter(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=TARGETS, **settings)


@pytest.mark.parametrize("rows", [messages, prompts])
def test_five_steps_from_the_folder_with_our_loss(
    rows: Callable[[], list[dict[str, Any]]], folder: Path, tmp_path: Path
) -> None:
    options = {"assistant_only_loss": True} if rows is messages else {}
    trainer = sft(str(folder), rows(), tmp_path, peft_config=adapter(), **options)
    found = losses(trainer)
    assert len(found) == 5 and all(map(math.isfinite, found)) and found[-1] < found[0]
    assert found[0] == pytest.approx(our_loss(folder), abs=1e-4)


def test_full_training_is_saved_as_a_folder_of_ours(folder: Path, tmp_path: Path) -> None:
    trainer = sft(str(folder), messages(), tmp_path, 2, assistant_only_loss=True)
    trainer.save_model(str(tmp_path / "whole"))
    assert trainer.args.output_dir and our_loss(tmp_path / "whole") < our_loss(folder)
    assert isinstance(eyespot.load(tmp_path / "whole", device="cpu").ask(pictures()[0], "hm?", max_new_tokens=2), str)


@pytest.mark.parametrize("whole", [None, ["connector"]])
def test_an_adapter_loads_back(whole: list[str] | None, folder: Path, tmp_path: Path) -> None:
    trainer = sft(
        str(folder), messages(), tmp_path, peft_config=adapter(modules_to_save=whole), assistant_only_loss=True
    )
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    base, processor = load_parts(folder, "float32")
    batch = processor.prompt_batch([([image], user_turn([image], "what color is it?")) for image in pictures()])
    assistant = eyespot.load(folder, device="cpu", adapter=tmp_path / "adapter")
    with torch.no_grad():
        untrained, trained, loaded = (m(**batch).logits for m in (base, trainer.model.eval(), assistant.model))
    real = torch.isfinite(untrained)
    assert float((trained - untrained)[real].abs().max()) > 0.1
    close(loaded[real], trained[real], 1e-4)
    assert not [name for name, _ in assistant.model.named_parameters() if "lora" in name]
    eyespot.save(assistant.model, assistant.processor, tmp_path / "merged")
    with torch.no_grad():
        close(load_parts(tmp_path / "merged", "float32")[0](**batch).logits[real], loaded[real])


def test_what_is_no_adapter_of_this_model_is_refused(folder: Path, tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is no adapter; give a folder with adapter_config\.json"):
        eyespot.load(folder, device="cpu", adapter=tmp_path)
    trainer = sft(str(folder), messages(), tmp_path, 1, peft_config=adapter(), assistant_only_loss=True)
    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=r"does not fit the model: \d+ tensors are missing or left over"):
        eyespot.load(folder, device="cpu", adapter=tmp_path / "adapter")


def test_own_adapters_are_not_overwritten_but_merged_on_request(adapted_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call model.merge_adapters\(\) first"):
        sft(str(adapted_folder), messages(), tmp_path, 1, peft_config=adapter(), assistant_only_loss=True)
    model, processor = load_parts(adapted_folder, "float32")
    batch = processor.prompt_batch([([image], user_turn([image], "q")) for image in pictures()])
    with torch.no_grad():
        before = model(**batch).logits
        model.merge_adapters()
        after = model(**batch).logits
    real = torch.isfinite(before)
    close(after[real], before[real], 1e-4)
    assert model.config.lora is None and not [name for name, _ in model.named_parameters() if "lora" in name]
    trainer = sft(
        model, messages(), tmp_path, 2, peft_config=adapter(), assistant_only_loss=True, processing_class=processor
    )
    assert losses(trainer)[0] == pytest.approx(our_loss(adapted_folder), abs=1e-4)
    trainer.save_model(str(tmp_path / "adapter"))
    with torch.no_grad():
        loaded = eyespot.load(adapted_folder, device="cpu", adapter=tmp_path / "adapter").model(**batch).logits
        close(loaded[real], trainer.model.eval()(**batch).logits[real], 1e-4)


def test_a_loss_on_placeholders_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set assistant_only_loss=True in SFTConfig, or give its data as prompt and"):
        sft(str(folder), messages(), tmp_path, 1)


# --- preferences -------------------------------------------------------------------------------------------------


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    rows = []
    for number, color in enumerate(COLORS):
        Image.new("RGB", (20, 20), color).save(tmp_path / f"{color}.png")
        rejected = COLORS[(number + 1) % len(COLORS)]
        row = {"image": f"{color}.png", "question": "what color?", "chosen": color, "rejected": rejected}
        rows.append(json.dumps(row))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    return tmp_path / "pairs.jsonl"


@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_preferred_answers_become_likelier(
    kind: str, folder: Path, adapted_folder: Path, preferences: Path, tmp_path: Path
) -> None:
    model = folder if kind == "whole" else adapted_folder
    result = run_preference(model, preferences, tmp_path / "out", max_steps=6, batch_size=4, lr=1e-3, device="cpu")
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-5) and result.margins[0] == pytest.approx(0, abs=1e-5)
    assert result.margins == sorted(result.margins) and result.margins[-1] > 0.1
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(("lora_" in name) if kind == "adapters" else name.startswith("language.") for name in changed)
    assert log_ratio(tmp_path / "out", preferences) > log_ratio(model, preferences) + 1
    assert json.loads((tmp_path / "out" / "training.json").read_text())["preference"]["margins"] == result.margins


def test_in_bfloat16_too_and_nothing_stays_switched_on(
    folder: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate leaves autocast on where a model's forward pass runs inside another of its own."""
    monkeypatch.setenv(BFLOAT16, "1")
    result = run_preference(folder, preferences, tmp_path / "out", max_steps=3, batch_size=4, lr=1e-3, device="cpu")
    assert result.losses[0] == pytest.approx(math.log(2), abs=0.02) and result.margins[-1] > 0.01
    assert not torch.is_autocast_enabled("cpu")


def log_ratio(folder: Path, preferences: Path) -> float:
    """Mean of log p(chosen) - log p(rejected), computed without TRL."""
    model, processor = load_parts(folder, "float32")
    pairs, _ = read_preferences(preferences)
    total = 0.0
    for pair in pairs:
        for sign, answer in ((1, pair.chosen), (-1, pair.rejected)):
            turns = [*user_turn(pair.images, pair.prompt), {"role": "assistant", "content": answer}]
            batch = processor.pad([processor.encode_conversation(turns)], "right")
            with torch.no_grad():
                loss = model(**batch, pixel_values=processor.pixel_values(pair.images)).loss
            total -= sign * float(loss) * int((batch["labels"] != -100).sum())
    return total / len(pairs)


def test_the_command(folder: Path, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eyespot.cli import main

    words = ["prefer", str(folder), str(preferences), "--out", str(tmp_path / "out")]
    assert main([*words, "--max-steps", "1", "--batch-size", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "1 steps, loss 0.6931 to 0.6931" in said and f"model: {tmp_path / 'out'}" in said
    assert main(words) == 2 and "exists; give another folder" in capsys.readouterr().err


def test_trl_itself_reads_the_processor(folder: Path, tmp_path: Path) -> None:
    """DPOTrainer with its own collator, as somebody would use it without eyespot's command."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {**row, "chosen": row.pop("completion"), "rejected": [{"role": "assistant", "content": "no"}]}
        for row in prompts()
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True,
        bf16=False, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(str(folder), args=arguments, train_dataset=Dataset.from_list(rows), peft_config=adapter())
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5) and losses(trainer)[1] < losses(trainer)[0]


def test_lines_that_cannot_be_used_are_counted(preferences: Path) -> None:
    good = json.loads(preferences.read_text().splitlines()[0])
    lines = [
        json.dumps(good),
        json.dumps({**good, "chosen": good["rejected"]}),
        json.dumps({**good, "rejected": " "}),
        json.dumps({**good, "image": "nowhere.png"}),
        json.dumps({**good, "prompt": "and this?"}),
        json.dumps({"prompt": "no picture", "chosen": "a", "rejected": "b", "images": []}),
        "{",
    ]
    preferences.write_text("\n".join(lines))
    pairs, report = read_preferences(preferences)
    assert [pair.id for pair in pairs] == ["pairs:1", "pairs:6"] and pairs[1].images == ()
    reasons = [rejected.reason for rejected in report.rejected]
    assert reasons == [
        "chosen and rejected are equal", "rejected is not a text", "image file is missing",
        "record has both 'question' and 'prompt'", "line is not JSON",
    ]  # fmt: skip
    preferences.write_text("{}\n")
    with pytest.raises(ConfigError, match="no usable preference"):
        read_preferences(preferences)


def test_settings_that_cannot_be(folder: Path, preferences: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beta is 0; it must be above 0"):
        run_preference(folder, preferences, tmp_path / "out", beta=0)


def test_without_trl(folder: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r'pip install "eyespot\[preference\]"'):
        run_preference(folder, preferences, tmp_path / "out")
