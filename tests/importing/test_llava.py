"""LLaVA folders of transformers and of LLaVA's authors: the same pixels, prompts, logits and words after the import."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import eyespot
from eyespot.cli import main
from eyespot.compose import build
from eyespot.export.llava import export_llava
from eyespot.importing import import_model
from eyespot.importing.llava import SYSTEM, import_llava
from eyespot.inference import Assistant, user_turn
from eyespot.processing.tokenizers import byte_tokenizer
from templates import make_tokenizer
from tiny import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, PICTURE, TEXT, close, randomise

QUESTION = "what is it?"
# as on the Hub: it goes through the parts of a message, and writes nothing after an answer that could end it
HUB_TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# for transformers and for us: a template that takes a message as text
STRING_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def words() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return tokenizer


def picture(width: int = 21, height: int = 17) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_llava(
    folder: Path,
    vision: str = "clip",
    text: str = "llama",
    template: str | None = HUB_TEMPLATE,
    tokenizer: Any = None,
) -> Any:
    """A random LLaVA as transformers saves it; returns the model."""
    tokenizer = words() if tokenizer is None else tokenizer
    sizes = {**TEXT, "vocab_size": len(tokenizer) + 2}  # as llava-hf, with rows to spare
    clip = vision == "clip"
    config = LlavaConfig(
        vision_config=(CLIPVisionConfig if clip else SiglipVisionConfig)(**PICTURE),
        text_config=(LlamaConfig if text == "llama" else Qwen2Config)(**sizes, tie_word_embeddings=text != "llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=NUM_PATCHES,
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model, 5)
    model.save_pretrained(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = (
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
        if clip
        else SiglipImageProcessorPil(size=side)
    )
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(clip),
        chat_template=template,
    ).save_pretrained(folder)
    return model.eval()


def source_inputs(folder: Path) -> Any:
    """What the source's own processor makes of a question about the picture."""
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]
    return LlavaProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


@torch.no_grad()
def assert_same(source: Any, folder: Path, imported: Path) -> None:
    """Pixels, ids, logits and generated text."""
    assistant = eyespot.load(imported, "cpu", "float32")
    inputs = source_inputs(folder)
    ours = assistant.processor.prompt_batch([([picture()], user_turn([picture()], QUESTION))])
    assert torch.equal(ours["pixel_values"], inputs["pixel_values"])
    assert torch.equal(ours["input_ids"], inputs["input_ids"])
    wanted = source(**inputs).logits
    close(assistant.model(**ours).logits, wanted)
    assert wanted.std() > 0.1  # else everything would be close
    tokens = source.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = assistant.processor.decode_answer(tokens.tolist())
    assert assistant.ask(picture(), QUESTION, max_new_tokens=6) == said


def rename(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def hub_name(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def new_name(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize(
    ("vision", "text", "change"),
    [("clip", "llama", hub_name), ("clip", "qwen2", new_name), ("siglip", "llama", None)],
    ids=["names of the hub", "new names, tied head", "siglip"],
)
def test_folders_of_transformers(tmp_path: Path, vision: str, text: str, change: Any) -> None:
    folder, out = tmp_path / "llava", tmp_path / "ours"
    source = write_llava(folder, vision, text)
    if change is not None:
        rename(folder, change)
    assert import_model("llava", str(folder), out) == []
    assert_same(source, folder, out)


def test_shards(tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    source = write_llava(folder)
    (folder / "model.safetensors").unlink()
    source.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    import_model("llava", str(folder), tmp_path / "ours")
    assert_same(source, folder, tmp_path / "ours")
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"does not hold the model .* tensors missing, first '(connector|language|vi)"):
        import_llava(str(folder))


def test_layers_that_are_not_read_are_left_out(tmp_path: Path) -> None:
    """CLIP has three layers here, and LLaVA reads what the second one gives."""
    write_llava(tmp_path)
    model = import_llava(str(tmp_path)).model
    assert len(model.vision.encoder.layers) == 2
    assert model.config.vision_layer == -1 and model.config.num_image_tokens == NUM_PATCHES


def test_half_precision(tmp_path: Path) -> None:
    write_llava(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: t.half() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    assert {p.dtype for p in import_llava(str(tmp_path)).model.parameters()} == {torch.float32}
    assert {p.dtype for p in import_llava(str(tmp_path), dtype="bfloat16").model.parameters()} == {torch.bfloat16}
    save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    assert {p.dtype for p in import_llava(str(tmp_path)).model.parameters()} == {torch.bfloat16}


def test_our_own_export_comes_back(tmp_path: Path, clip_folder: Path, llama_folder: Path) -> None:
    model, processor = build(
        {"name": "pretrained", "args": {"source": str(clip_folder)}},
        {"name": "mlp", "args": {"hidden_dim": 24}},
        {"name": "pretrained", "args": {"source": str(llama_folder)}, "template": "plain", "dtype": "float32"},
    )
    model.config.image_scale = 1.5
    ours = Assistant(model, processor, "cpu")
    export_llava(ours, tmp_path / "llava")
    assert import_model("llava", str(tmp_path / "llava"), tmp_path / "back") == []
    back = eyespot.load(tmp_path / "back", "cpu")
    turns = [user_turn([picture()], QUESTION)[0], {"role": "assistant", "content": "a cat"}, *user_turn([], "sure?")]
    batches = [a.processor.prompt_batch([([picture()], turns)]) for a in (ours, back)]
    logits = [a.model(**b).logits for a, b in zip((ours, back), batches, strict=True)]
    close(logits[1][..., :260], logits[0][..., :260])
    assert back.processor.end_of_turn_id == processor.end_of_turn_id


# --- templates -------------------------------------------------------------------------------------------------------


def test_a_template_for_texts_is_taken_over(tmp_path: Path) -> None:
    write_llava(tmp_path, template=STRING_TEMPLATE)
    assert import_llava(str(tmp_path)).processor.chat_template == STRING_TEMPLATE


def test_a_template_that_nothing_equals(tmp_path: Path) -> None:
    write_llava(tmp_path, template=HUB_TEMPLATE.replace("ASSISTANT:", "BOT:"))
    with pytest.raises(ValueError, match=r"asks with 'USER: <image>\\nQ BOT:', which no template .* --template FILE"):
        import_llava(str(tmp_path))
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    imported = import_llava(str(tmp_path), template=str(file))
    assert imported.processor.chat_template == file.read_text()
    assert imported.notes == []
    with pytest.raises(ValueError, match="'nowhere' is no file"):
        import_llava(str(tmp_path), template="nowhere")


def test_other_tokens_for_the_same_prompt_are_noted(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text puts one before each piece that we tokenize alone."""
    write_llava(tmp_path, tokenizer=make_tokenizer("pieces", ("<image>",)))
    imported = import_llava(str(tmp_path))
    assert len(imported.notes) == 1 and "eyespot never joins typed text" in imported.notes[0]


def test_no_template_at_all(tmp_path: Path) -> None:
    write_llava(tmp_path, template=None)
    imported = import_llava(str(tmp_path))
    assert "USER: … ASSISTANT:" in imported.notes[0]
    text = imported.processor.apply_chat_template(user_turn([None], "Q"), add_generation_prompt=True)
    assert text == "USER: <image>\nQ ASSISTANT:"


# --- the layout of LLaVA's authors -----------------------------------------------------------------------------------


def write_original(folder: Path, clip_folder: Path) -> tuple[Any, nn.Module]:
    """A random LLaVA of its authors' layout; returns its language model and projector."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(**{**TEXT, "vocab_size": 260}, tie_word_embeddings=False, rope_parameters=rope)
    language = LlamaForCausalLM(config)
    projector = nn.Sequential(nn.Linear(PICTURE["hidden_size"], 32), nn.GELU(), nn.Linear(32, 32))
    randomise(language, 6)
    randomise(projector, 7)
    byte_tokenizer().save_pretrained(folder)
    values = {
        **config.to_dict(),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": str(clip_folder),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": PICTURE["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
    }
    del values["rope_parameters"]
    values["rope_theta"] = 500.0  # as its version of transformers says it
    (folder / "config.json").write_text(json.dumps(values))
    tensors = dict(language.state_dict())
    tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as its version of transformers saved it
    torch.save(tensors, folder / "pytorch_model-00001-of-00001.bin")
    return language.eval(), projector


def pasted_on_a_square(image: PIL.Image.Image, color: tuple[int, ...]) -> PIL.Image.Image:
    square = PIL.Image.new("RGB", (max(image.size), max(image.size)), color)
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square


def naive_logits(
    clip: Any, projector: nn.Module, language: Any, pixels: Tensor, before: list[int], after: list[int]
) -> Tensor:
    """CLIP's last layer but one without CLS, projected, between the embedded words."""
    patches = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    embed = language.get_input_embeddings()
    row = torch.cat([embed(torch.tensor([before])), projector(patches), embed(torch.tensor([after]))], dim=1)
    return language(inputs_embeds=row).logits  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("size", [(21, 17), (9, 30), (16, 16)])
def test_the_authors_layout(tmp_path: Path, clip_folder: Path, size: tuple[int, int]) -> None:
    folder, out = tmp_path / "llava", tmp_path / "ours"
    folder.mkdir()
    language, projector = write_original(folder, clip_folder)
    notes = import_model("llava", str(folder), out)
    assert len(notes) == 1 and "as it was before LLaVA's training" in notes[0]
    assistant = eyespot.load(out, "cpu", "float32")
    image = picture(*size)

    clip_pictures = AutoImageProcessor.from_pretrained(clip_folder)
    square = pasted_on_a_square(image, tuple(int(mean * 255) for mean in clip_pictures.image_mean))
    pixels = clip_pictures(images=[square], return_tensors="pt")["pixel_values"]
    batch = assistant.processor.prompt_batch([([image], user_turn([image], QUESTION))])
    assert torch.equal(batch["pixel_values"], pixels)

    def ids(text: str) -> list[int]:
        return [byte + 4 for byte in text.encode()]

    before, after = ids(f"{SYSTEM}USER: "), ids(f"\n{QUESTION} ASSISTANT:")
    assert batch["input_ids"].tolist() == [[*before, *[260] * NUM_PATCHES, *after]]
    clip = CLIPVisionModel.from_pretrained(clip_folder).eval()
    wanted = naive_logits(clip, projector, language, pixels, before, after)
    close(assistant.model(**batch).logits[..., :260], wanted)


def test_a_padding_token_without_a_row(tmp_path: Path, clip_folder: Path) -> None:
    """The tokenizer of llava-hf, which docs/importing.md recommends, pads with an id behind the authors' embedding."""
    folder, out = tmp_path / "llava", tmp_path / "ours"
    folder.mkdir()
    write_original(folder, clip_folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == 260
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    import_model("llava", str(folder), out, tokenizer=str(tmp_path / "tokenizer"))
    assistant = eyespot.load(out, "cpu", "float32")
    image = picture(16, 16)
    asked = [([image], user_turn([image], question)) for question in ("What?", "And what is there beside it?")]
    with torch.no_grad():
        both = assistant.model(**assistant.processor.prompt_batch(asked)).logits[:, -1]
        for found, conversation in zip(both, asked, strict=True):
            close(found[:260], assistant.model(**assistant.processor.prompt_batch([conversation])).logits[0, -1, :260])


@torch.no_grad()
def test_a_vision_tower_beside_it_and_one_inside_it(tmp_path: Path, clip_folder: Path) -> None:
    write_original(tmp_path, clip_folder)
    other = tmp_path / "tower"
    shutil.copytree(clip_folder, other)
    tower = CLIPVisionModel.from_pretrained(clip_folder)
    randomise(tower, 9)
    tower.save_pretrained(other)
    given = import_llava(str(tmp_path), vision=str(other)).model
    close(given.vision.embeddings.class_embedding, tower.embeddings.class_embedding)
    file = tmp_path / "pytorch_model-00001-of-00001.bin"
    inside = {f"model.vision_tower.vision_tower.vision_model.{name}": t for name, t in tower.state_dict().items()}
    torch.save({**torch.load(file, weights_only=True), **inside}, file)
    imported = import_llava(str(tmp_path))
    assert imported.notes == []
    close(imported.model.vision.embeddings.class_embedding, tower.embeddings.class_embedding)


# --- what is refused -------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llava_next"}, "type 'llava_next'; expected 'llava' .* cut pictures into tiles"),
        ({"vision_feature_layer": [-2, -1]}, r"joins the vision layers \[-2, -1\]"),
        ({"projector_hidden_act": "relu"}, "projector with 'relu'"),
        ({"vision_feature_layer": -9}, "vision layer -9 does not exist"),
    ],
)
def test_layouts_of_transformers_that_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    write_llava(tmp_path)
    edit_config(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        import_llava(str(tmp_path))


def test_siglip_has_no_first_token_to_drop(tmp_path: Path) -> None:
    write_llava(tmp_path, "siglip")
    edit_config(tmp_path, vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match="drops the first token of a siglip_vision_model"):
        import_llava(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mm_projector_type": "linear"}, "has mm_projector_type 'linear'; expected 'mlp2x_gelu'"),
        ({"image_aspect_ratio": "anyres"}, "has image_aspect_ratio 'anyres'; expected 'pad'"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
    ],
)
def test_layouts_of_the_authors_that_are_refused(
    tmp_path: Path, clip_folder: Path, values: dict[str, Any], message: str
) -> None:
    write_original(tmp_path, clip_folder)
    edit_config(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        import_llava(str(tmp_path))


def test_every_tensor_has_its_place(tmp_path: Path) -> None:
    write_llava(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "image_newline": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 tensors without a place, first 'image_newline'"):
        import_llava(str(tmp_path))
    save_file({**tensors, "language_model.model.extra": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors left over, first 'language.model.extra'"):
        import_llava(str(tmp_path))
    bias = "multi_modal_projector.linear_1.bias"
    save_file({**tensors, bias: torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors of another shape, first 'connector\.layers\.0\.bias'"):
        import_llava(str(tmp_path))
    save_file({name: t for name, t in tensors.items() if name != bias}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors missing, first 'connector\.layers\.0\.bias'"):
        import_llava(str(tmp_path))


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_a_pickle_that_wants_to_run_code(tmp_path: Path, clip_folder: Path) -> None:
    write_original(tmp_path, clip_folder)
    weights, trace = tmp_path / "pytorch_model-00001-of-00001.bin", tmp_path / "trace"
    torch.save({"model.norm.weight": Evil(trace)}, weights)
    with pytest.raises(ValueError, match=r"refused: .*GLOBAL .*system.* could run code of its maker"):
        import_llava(str(tmp_path))
    assert not trace.exists()
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is no file of torch.save"):
        import_llava(str(tmp_path))


def test_a_tokenizer_that_wants_to_run_code(tmp_path: Path) -> None:
    write_llava(tmp_path)
    trace, file = tmp_path / "trace", tmp_path / "tokenizer_config.json"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass EvilTokenizer: pass\n")
    evil = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **evil}))
    import_llava(str(tmp_path))  # the tokenizer is read from its JSON
    assert not trace.exists()


def test_a_template_that_knows_no_pictures(tmp_path: Path) -> None:
    write_llava(tmp_path, template="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    with pytest.raises(ValueError, match=r"takes no message with a picture .* --template FILE"):
        import_llava(str(tmp_path))


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"has no config\.json \(it holds notes\.txt\)"):
        import_llava(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        import_llava(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor a Hub name that can be read"):
        import_llava("no-such/model")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "llava", tmp_path / "ours"
    source = write_llava(folder)
    assert main(["import", "llava", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"model: {out}\n"
    assert_same(source, folder, out)
    assert main(["import", "llava", str(folder), "--out", str(out)]) == 2
    assert "exists already; delete it or choose another folder" in capsys.readouterr().err
    assert main(["import", "llava", str(folder), "--out", f"{out}2", "--rename", "a=b"]) == 2
    assert "import llava has no option 'rename'; it takes vision, tokenizer" in capsys.readouterr().err
    assert main(["import", "llava", str(folder), "--out", f"{out}2", "--vision", "x"]) == 2
    assert "holds its vision tower; leave --vision out" in capsys.readouterr().err
    assert not Path(f"{out}2").exists()
