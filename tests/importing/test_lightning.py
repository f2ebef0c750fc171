"""Checkpoints of gemma270m-llava's kind, made small: the same logits after the import, and nothing run on the way."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import eyespot
from eyespot.cli import main
from eyespot.compose import build_from_settings
from eyespot.config import ConnectorSettings, LanguageSettings, ModelSettings, VisionSettings
from eyespot.importing.lightning import TABLE, import_lightning, unpack_4bit
from eyespot.inference import user_turn
from eyespot.training.checkpoint import CheckpointWriter
from tiny import PICTURE, WIDTH, close, randomise

QUESTION = "what is it?"
HIDDEN = 40
LORA = {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def picture() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8))


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(PICTURE["hidden_size"], HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, WIDTH)]
        self.projector = nn.Sequential(*layers)


class Source(nn.Module):
    """CLIP, projector and Gemma with adapters, and a token ``<image>`` that is embedded but never read."""

    def __init__(self, clip_folder: Path, gemma_folder: Path) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vision_encoder = CLIPVisionModel.from_pretrained(clip_folder)
        self.model.vision_projector = Projector()
        language = AutoModelForCausalLM.from_pretrained(gemma_folder)
        language.resize_token_embeddings(language.config.vocab_size + 1, mean_resizing=False)
        lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=LORA["target_modules"])
        self.model.language_model = inject_adapter_in_model(lora, language)
        randomise(self, 4)

    def logits(self, pixels: Tensor, before: list[int], after: list[int]) -> Tensor:
        patches = self.model.vision_encoder(pixels).last_hidden_state[:, 1:]
        embed = self.model.language_model.get_input_embeddings()
        image = self.model.vision_projector.projector(patches)
        row = torch.cat([embed(torch.tensor([before])), image, embed(torch.tensor([after]))], dim=1)
        return self.model.language_model(inputs_embeds=row).logits  # type: ignore[no-any-return]


def checkpoint(source: Source, clip_folder: Path, gemma_folder: Path) -> dict[str, Any]:
    """As Lightning saves it, with the names of transformers 4 and of peft's wrapper."""
    old, wrapped = "model.vision_encoder.vision_model.", "model.language_model.base_model.model."
    config = {
        "gemma_model_name": str(gemma_folder), "vision_model_name": str(clip_folder), "lora": LORA, "use_4bit": False,
        "projector_hidden_dim": HIDDEN,
    }  # fmt: skip
    return {
        "state_dict": {
            name.replace("model.vision_encoder.", old).replace("model.language_model.", wrapped): tensor
            for name, tensor in source.state_dict().items()
        }
        | {f"{old}embeddings.position_ids": torch.arange(5)[None]},
        "hyper_parameters": {"config": {"model": config, "training": {"max_epochs": 3}}},
        "pytorch-lightning_version": "2.5.0",
        "epoch": 2,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}],
    }


@pytest.fixture(scope="module")
def source(clip_folder: Path, gemma_folder: Path) -> Source:
    return Source(clip_folder, gemma_folder).eval()


@pytest.fixture
def saved(source: Source, clip_folder: Path, gemma_folder: Path) -> dict[str, Any]:
    return checkpoint(source, clip_folder, gemma_folder)


def write(content: dict[str, Any], folder: Path) -> str:
    torch.save(content, folder / "last.ckpt")
    return str(folder / "last.ckpt")


@torch.no_grad()
def assert_same(source: Source, imported: Path, clip_folder: Path) -> None:
    assistant = eyespot.load(imported, "cpu", "float32")
    ours = assistant.processor.prompt_batch([([picture()], user_turn([picture()], QUESTION))])
    pixels = AutoImageProcessor.from_pretrained(clip_folder)(images=[picture()], return_tensors="pt")["pixel_values"]
    assert torch.equal(ours["pixel_values"], pixels)
    after = [byte + 4 for byte in f"\nHuman: {QUESTION}\nAssistant:".encode()]
    assert ours["input_ids"].tolist() == [[1, *[260] * 4, *after]]
    wanted = source.logits(pixels, [1], after)[..., :260]
    close(assistant.model(**ours).logits[..., :260], wanted)
    assert wanted.std() > 0.1


def test_the_parts_are_in_the_checkpoint(
    source: Source, saved: dict[str, Any], tmp_path: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "lightning", write(saved, tmp_path), "--out", str(tmp_path / "ours")]) == 0
    shown = capsys.readouterr().out
    assert "note: language.model.embed_tokens.weight: 1 rows of added tokens are left out" in shown
    assert_same(source, tmp_path / "ours", clip_folder)
    lora = eyespot.load(tmp_path / "ours", "cpu").model.config.lora
    assert lora is not None and (lora["language"]["r"], lora["language"]["alpha"]) == (2, 4)


def test_only_what_was_trained_is_in_the_file(
    source: Source, saved: dict[str, Any], tmp_path: Path, clip_folder: Path, gemma_folder: Path
) -> None:
    """Frozen parts come from their folders then, and we say so."""
    tensors = saved["state_dict"]
    saved["state_dict"] = {n: t for n, t in tensors.items() if "lora_" in n or "vision_projector" in n}
    saved["hyper_parameters"]["config"]["model"] |= {"vision_model_name": "gone", "gemma_model_name": "gone"}
    imported = import_lightning(write(saved, tmp_path), vision=str(clip_folder), language=str(gemma_folder))
    assert [note.partition(":")[0] for note in imported.notes] == ["vision", "language"]
    plain = AutoModelForCausalLM.from_pretrained(gemma_folder).state_dict()
    close(imported.model.language.model.layers[0].mlp.up_proj.weight, plain["model.layers.0.mlp.up_proj.weight"])
    half = {**saved["state_dict"], **{n: t for n, t in tensors.items() if "layers.0.mlp" in n}}
    with pytest.raises(ValueError, match=r"lacks .* tensors of the vision part, first 'vision.embeddings"):
        import_lightning(
            write({**saved, "state_dict": half}, tmp_path), vision=str(clip_folder), language=str(gemma_folder)
        )


def test_a_recipe_names_the_parts(
    source: Source, saved: dict[str, Any], tmp_path: Path, clip_folder: Path, gemma_folder: Path
) -> None:
    del saved["hyper_parameters"]
    file = write(saved, tmp_path)
    with pytest.raises(ValueError, match=r"does not say what its parts are .* recipe=NAME"):
        import_lightning(file)
    settings = [
        "recipe=gemma270m_llava", f"model.connector.args.hidden_dim={HIDDEN}", "model.language.lora.r=2",
        "model.language.lora.alpha=4", f"model.language.lora.targets={json.dumps(LORA['target_modules'])}",
    ]  # fmt: skip
    folders = ["--vision", str(clip_folder), "--language", str(gemma_folder)]
    assert main(["import", "lightning", file, *settings, "--out", str(tmp_path / "ours"), *folders]) == 0
    assert_same(source, tmp_path / "ours", clip_folder)


def test_names_can_be_given(source: Source, saved: dict[str, Any], tmp_path: Path, clip_folder: Path) -> None:
    theirs = {name.replace("vision_projector.projector.", "bridge.net."): t for name, t in saved["state_dict"].items()}
    file = write({**saved, "state_dict": {**theirs, "metric.count": torch.ones(1)}}, tmp_path)
    with pytest.raises(ValueError, match=r"5 tensors without a place, first 'metric.count'; .* --rename old=new"):
        import_lightning(file)
    with pytest.raises(ValueError, match=r"1 tensors without a place, first 'metric.count'"):
        import_lightning(file, rename=["model.bridge.net.=connector.layers."])
    renames = ["--rename", "model.bridge.net.=connector.layers.", "--rename", "metric.="]
    assert main(["import", "lightning", file, "--out", str(tmp_path / "ours"), *renames]) == 0
    assert_same(source, tmp_path / "ours", clip_folder)
    with pytest.raises(ValueError, match="--rename is 'metric'; write old=new"):
        import_lightning(file, rename=["metric"])


def test_every_tensor_has_its_place(saved: dict[str, Any], tmp_path: Path) -> None:
    tensors = dict(saved["state_dict"])

    def message(changed: dict[str, Tensor]) -> str:
        with pytest.raises(ValueError) as caught:
            import_lightning(write({**saved, "state_dict": changed}, tmp_path))
        return str(caught.value)

    norm = "model.vision_projector.projector.4.weight"  # as an early version of the source had
    assert "1 tensors that this model has not, first 'connector.layers.4.weight'" in message(
        {**tensors, norm: torch.ones(WIDTH)}
    )
    bias = "model.vision_projector.projector.3.bias"
    assert f"has 'connector.layers.3.bias' as [2], this model as [{WIDTH}]" in message({**tensors, bias: torch.ones(2)})
    assert "lacks 1 tensors of the connector part" in message({n: t for n, t in tensors.items() if n != bias})
    some = next(name for name in tensors if "lora_B" in name)
    assert "lacks 1 tensors of the language part" in message({n: t for n, t in tensors.items() if n != some})
    embedding = "model.language_model.base_model.model.model.embed_tokens.weight"
    assert "has 270 tokens in 'language.model.embed_tokens.weight', but the tokenizer 260" in message(
        {**tensors, embedding: torch.ones(270, WIDTH)}
    )


def test_two_names_for_one_place(saved: dict[str, Any], tmp_path: Path) -> None:
    double = {"model.projector.0.bias": torch.ones(HIDDEN)}
    with pytest.raises(ValueError, match=r"has two tensors for 'connector.layers.0.bias'"):
        import_lightning(write({**saved, "state_dict": {**saved["state_dict"], **double}}, tmp_path))


def test_the_table_is_documented() -> None:
    page = (Path(eyespot.__file__).parents[2] / "docs" / "importing.md").read_text(encoding="utf-8")
    for old, new in TABLE:
        assert f"| `{old}` | `{new}` |" in page


# --- weights in four bits --------------------------------------------------------------------------------------------


def pack(weight: Tensor, nested: bool) -> dict[str, Tensor]:
    """A weight as bitsandbytes keeps it in a state_dict, by its definition: a code for the nearest of 16 values, times
    the largest of each block of 64; nested, these scales in eight bits with scales of their own."""
    values = torch.linspace(-1, 1, 16)
    blocks = weight.flatten().split(64)
    scales = torch.stack([block.abs().max() for block in blocks])
    codes = torch.cat([(block[:, None] / s - values).abs().argmin(1) for block, s in zip(blocks, scales, strict=True)])
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape),
    }  # fmt: skip
    packed = {"": ((codes[::2] << 4) | codes[1::2]).to(torch.uint8)[:, None], ".absmax": scales, ".quant_map": values}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(scales.mean())}
        fine, largest = torch.linspace(-1, 1, 256), (scales - scales.mean()).abs().max()
        near = (((scales - scales.mean()) / largest)[:, None] - fine).abs().argmin(1)
        packed |= {".absmax": near.to(torch.uint8), ".nested_quant_map": fine, ".nested_absmax": largest[None]}
    packed[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"w{ending}": tensor for ending, tensor in packed.items()}


@pytest.mark.parametrize("nested", [False, True])
def test_packed_weights_are_near_what_was_packed(nested: bool) -> None:
    weight = torch.randn(48, 33, generator=torch.Generator().manual_seed(0))[:, :32]
    packed = pack(weight, nested)
    assert packed["w"].dtype == torch.uint8 and packed["w"].numel() == weight.numel() // 2
    found = unpack_4bit({**packed, "other": torch.ones(1)})
    assert set(found) == {"w", "other"} and found["w"].shape == weight.shape
    step = 2 / 15  # between two of the 16 values
    assert ((found["w"] - weight).abs() <= weight.abs().max() * (step / 2 + 0.02 * nested)).all()
    assert (found["w"] - weight).abs().max() > 0  # it was rounded


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_agrees(nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    packed = {"w": codes, **{f"w.{name}": t for name, t in state.as_dict(packed=True).items()}}
    close(unpack_4bit(packed)["w"], bnb.dequantize_4bit(codes, state))


@torch.no_grad()
def test_a_checkpoint_with_weights_in_four_bits(
    source: Source, saved: dict[str, Any], tmp_path: Path, clip_folder: Path
) -> None:
    tensors = saved["state_dict"]
    other = deepcopy(source)
    for name in [name for name in tensors if name.endswith("proj.base_layer.weight") or "up_proj.weight" in name]:
        packed = pack(tensors.pop(name), nested=True)
        tensors |= {name + ending.removeprefix("w"): tensor for ending, tensor in packed.items()}
        other.state_dict()[name.replace("base_model.model.", "")].copy_(unpack_4bit(packed)["w"])
    assert main(["import", "lightning", write(saved, tmp_path), "--out", str(tmp_path / "ours")]) == 0
    assert_same(other, tmp_path / "ours", clip_folder)


# --- files that are no such checkpoint -------------------------------------------------------------------------------


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_a_checkpoint_that_wants_to_run_code(saved: dict[str, Any], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(ValueError, match=r"is refused: .*GLOBAL .*system.* could run code of its maker"):
        import_lightning(write({**saved, "callbacks": Evil(trace)}, tmp_path))
    assert not trace.exists()


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; give a .ckpt file"):
        import_lightning(str(tmp_path / "none.ckpt"))
    with pytest.raises(ValueError, match="no Lightning checkpoint: it has no 'state_dict' but optimizer, step"):
        import_lightning(write({"step": 1, "optimizer": {}}, tmp_path))
    with pytest.raises(ValueError, match=r"holds the state of an optimizer but no weights; .* the folder it lies in"):
        import_lightning(write({"state_dict": {}}, tmp_path))
    with pytest.raises(ValueError, match=r"has no checkpoint.json"):
        import_lightning(str(tmp_path))


def test_a_checkpoint_folder_of_ours(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = ModelSettings(
        vision=VisionSettings("vit", {"image_size": 16, "patch_size": 8, **sizes}),
        connector=ConnectorSettings("mlp"),
        language=LanguageSettings("gpt", {"max_position_embeddings": 96, **sizes}, dtype="float32"),
    )
    torch.manual_seed(7)
    model, processor = build_from_settings(settings)
    processor.save_pretrained(tmp_path / "processor")
    randomise(model.connector, 1)
    trainer = SimpleNamespace(is_global_zero=True, save_checkpoint=lambda file, weights_only: file.write_bytes(b""))
    folder = CheckpointWriter(tmp_path / "run", model, settings, 7, tmp_path / "processor").write(3, trainer)
    assert main(["import", "lightning", str(folder), "--out", str(tmp_path / "ours")]) == 0
    ids = torch.tensor([[5, 6, 7]])
    close(eyespot.load(tmp_path / "ours", "cpu", "float32").model(ids).logits, model.eval()(ids).logits)
    with pytest.raises(ValueError, match="a checkpoint folder knows its parts; leave 'recipe=smoke' out"):
        import_lightning(str(folder), settings=["recipe=smoke"])
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").eos_token == "<eos>"
