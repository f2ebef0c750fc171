"""LLaVA 1.5 in both of its layouts: transformers' own (llava-hf) and that of its authors (liuhaotian).

Source: arXiv 2310.03744; https://huggingface.co/docs/transformers/model_doc/llava;
https://github.com/haotian-liu/LLaVA, files llava/model/*.py and llava/conversation.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from eyespot.importing import (
    Blueprint,
    Imported,
    Table,
    assemble,
    read_config,
    read_tensors,
    renamed,
    source_folder,
    tokenizer_of,
)
from eyespot.inference import user_turn
from eyespot.models.vision.pretrained import load_vision, token_counts
from eyespot.processing.processor import IMAGE_TEXT, Processor
from eyespot.processing.prompt import TEMPLATES, PromptError

# conv_vicuna_v1 of llava/conversation.py, with which LLaVA 1.5 was trained; llava-hf leaves the first sentence out
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TURNS = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}ASSISTANT: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ 'USER: ' if m.role == 'user' else '' }}{{ m.images }}{{ '\\n' if m.images else '' }}"
    "{{ m.text }}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VICUNA = "{% if messages[0].role != 'system' %}{{ '" + SYSTEM.replace("'", "\\'") + "' }}{% endif %}" + TURNS
# eyespot's own export puts this in front of the template that a model was trained with
EXPORTED = "{%- set messages = ns.turns -%}"
MARK = "\ue000"  # which that export puts between texts, and its tokenizer drops
PARTS: Table = (
    ("model.vision_tower.", "vision."),
    ("vision_tower.", "vision."),
    ("model.multi_modal_projector.linear_1.", "connector.layers.0."),
    ("multi_modal_projector.linear_1.", "connector.layers.0."),
    ("model.multi_modal_projector.linear_2.", "connector.layers.3."),
    ("multi_modal_projector.linear_2.", "connector.layers.3."),
    ("model.language_model.", "language.model."),
    ("language_model.model.", "language.model."),
    ("language_model.lm_head.", "language.lm_head."),
    ("lm_head.", "language.lm_head."),
)
ORIGINAL: Table = (
    ("model.vision_tower.vision_tower.", "vision."),
    ("model.mm_projector.0.", "connector.layers.0."),
    ("model.mm_projector.2.", "connector.layers.3."),
    ("model.", "language.model."),
    ("lm_head.", "language.lm_head."),
)
# of the authors' config.json, what is the language model's; the last two are names of transformers before 5
TEXT_KEYS = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {"architectures", "model_type"}
CURE = "it is not the LLaVA that its config.json describes"


def import_llava(
    source: str,
    *,
    vision: str | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    dtype: str = "auto",
) -> Imported:
    """A LLaVA 1.5 folder or Hub name.

    Args:
        vision: of the authors' layout, the folder or Hub name of its vision tower; by default ``mm_vision_tower`` of
            the configuration. tokenizer: folder or Hub name; by default the source's own.
        template: a name in TEMPLATES, a file with a Jinja template, or the template; by default the one whose prompt
            is the source's own. dtype: see ``assemble``.

    Raises:
        ValueError: another layout, no template of ours writes its prompt, or a tensor is missing, left over or of
            another shape.
    """
    folder = source_folder(source)
    config = read_config(folder)
    words = tokenizer_of(tokenizer or folder)
    if "mm_vision_tower" in config:
        return import_original(folder, config, words, vision, template, dtype)
    if config.get("model_type") != "llava" or "text_config" not in config:
        raise ValueError(
            f"{source!r} holds a model of type {config.get('model_type')!r}; expected 'llava' with vision_config and "
            "text_config (llava-hf/llava-1.5-…), or mm_vision_tower (liuhaotian/llava-v1.5-…). LLaVA-NeXT and later "
            "cut pictures into tiles, which eyespot does not"
        )
    if vision is not None:
        raise ValueError(f"{source!r} holds its vision tower; leave --vision out")
    return import_transformers(folder, words, template, dtype)


# --- transformers' layout --------------------------------------------------------------------------------------------


def import_transformers(folder: Path, tokenizer: PreTrainedTokenizerBase, template: str | None, dtype: str) -> Imported:
    """What ``LlavaForConditionalGeneration.save_pretrained`` wrote, by old and by new names."""
    config: Any = LlavaConfig.from_pretrained(folder)
    check_config(config, folder)
    text = config.text_config
    text.tie_word_embeddings = config.tie_word_embeddings
    theirs = chat_template(folder, tokenizer)
    blueprint = Blueprint(
        vision_config=config.vision_config,
        text_config=text,
        connector={"name": "mlp", "depth": 2, "hidden_dim": text.hidden_size},
        image_processor=AutoImageProcessor.from_pretrained(folder, trust_remote_code=False),
        tokenizer=tokenizer,
        template=read_template(template) if template else TURNS,
        vision_layer=config.vision_feature_layer,
        keep_cls=config.vision_feature_select_strategy == "full" and has_cls(config.vision_config),
        image_token_id=config.image_token_id,
    )
    tensors = renamed(read_tensors(folder), PARTS, str(folder), CURE)
    if text.tie_word_embeddings:
        tensors.pop("language.lm_head.weight", None)
    imported = assemble(blueprint, tensors, str(folder), dtype)
    if theirs is None:
        imported.notes.append("it has no chat template: prompts are USER: … ASSISTANT:, as LLaVA 1.5 was trained")
    elif template is None:
        choose_template(imported.processor, theirs, folder)
        imported.notes.extend(prompt_difference(imported.processor, tokenizer, theirs))
    return imported


def check_config(config: Any, folder: Path) -> None:
    """Raise ValueError for what our parts do not compute."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if isinstance(layer, list):
        raise ValueError(  # noqa: TRY004  bad data is always a ValueError
            f"{str(folder)!r} joins the vision layers {layer}; only one layer can be imported"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError(
            f"{str(folder)!r} has a projector with {config.projector_hidden_act!r} and bias "
            f"{config.multimodal_projector_bias}; only gelu with bias can be imported"
        )
    if strategy == "default" and not has_cls(config.vision_config):
        raise ValueError(
            f"{str(folder)!r} drops the first token of a {config.vision_config.model_type} (vision_feature_select_"
            "strategy 'default'), which is a patch of the picture and no CLS; only 'full' can be imported"
        )


def has_cls(config: PreTrainedConfig) -> bool:
    """Whether an encoder gives a token before its patches."""
    return token_counts(config)[0] > 0


# --- the authors' layout ---------------------------------------------------------------------------------------------


def import_original(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    vision: str | None,
    template: str | None,
    dtype: str,
) -> Imported:
    """A language model with a projector in it, and a vision tower beside it."""
    check_original(config, folder)
    tower = vision or config["mm_vision_tower"]
    encoder = load_vision(tower)
    blueprint = Blueprint(
        vision_config=encoder.config,
        text_config=LlamaConfig(**{key: value for key, value in config.items() if key in TEXT_KEYS}),
        connector={"name": "mlp", "depth": 2, "hidden_dim": config["hidden_size"]},
        image_processor=original_pictures(tower, pad=config.get("image_aspect_ratio") == "pad"),
        tokenizer=tokenizer,
        template=read_template(template) if template else VICUNA,
        vision_layer=config["mm_vision_select_layer"],
    )
    tensors = renamed(read_tensors(folder), ORIGINAL, str(folder), CURE)
    notes = []
    if not any(name.startswith("vision.") for name in tensors):
        tensors |= {f"vision.{name}": tensor for name, tensor in encoder.state_dict().items()}
        notes.append(f"the vision tower comes from {tower!r}, as it was before LLaVA's training")
    if blueprint.text_config.tie_word_embeddings:
        tensors.pop("language.lm_head.weight", None)
    return assemble(blueprint, tensors, str(folder), dtype)._replace(notes=notes)


def check_original(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError for what our parts do not compute."""
    wanted = {
        "architectures": (["LlavaLlamaForCausalLM"],),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_patch_merge_type": ("flat", None),
        "image_aspect_ratio": ("pad", "square", None),
    }
    for key, values in wanted.items():
        if (found := config.get(key)) not in values:
            raise ValueError(
                f"{str(folder)!r} has {key} {found!r}; expected {values[0]!r}, as in liuhaotian/llava-v1.5-7b"
            )


def original_pictures(tower: str, pad: bool) -> LlavaImageProcessorPil:
    """The tower's image processor, behind bars of the mean colour that make pictures square if LLaVA did so."""
    theirs: Any = AutoImageProcessor.from_pretrained(tower, trust_remote_code=False)
    names = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize",
             "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")  # fmt: skip
    return LlavaImageProcessorPil(**{name: getattr(theirs, name) for name in names}, do_pad=pad)


# --- words -----------------------------------------------------------------------------------------------------------


def read_template(template: str) -> str:
    """A name in TEMPLATES, the content of a file, or the template itself."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" in template:
        return template
    if not Path(template).is_file():
        raise ValueError(f"template {template!r} is no file; give one, {' or '.join(TEMPLATES)}, or a Jinja template")
    return Path(template).read_text(encoding="utf-8")


def chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The source's own, wherever its version of transformers put it."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    if (file := folder / "chat_template.json").is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])
    template: str | None = tokenizer.chat_template
    return template


def choose_template(processor: Processor, theirs: str, folder: Path) -> None:
    """Give the processor the first template that asks as the source asks and that a model can be trained with.

    Templates of transformers go through the parts of a message, ours are written for its text, so theirs is taken over
    only if it does without.

    Raises:
        ValueError: none does.
    """
    candidates = [theirs.rpartition(EXPORTED)[2], TURNS, VICUNA, *TEMPLATES.values()]
    for candidate in candidates:
        processor.chat_template = candidate
        if _asks_like(processor, theirs):
            return
    asked = _asked(processor.tokenizer, theirs)
    raise ValueError(
        f"the chat template of {str(folder)!r} asks with {asked!r}, which no template of eyespot does; give one that "
        "does with --template FILE"
    )


def _asks_like(processor: Processor, theirs: str) -> bool:
    try:
        ours = processor.apply_chat_template(user_turn([None], "Q"), add_generation_prompt=True)
        return bool(processor.end_of_turn_id >= 0) and _bare(processor, ours) == _asked(processor.tokenizer, theirs)
    except (PromptError, TypeError):  # a template for parts stumbles over text
        return False


def _asked(tokenizer: Any, template: str) -> str:
    """What a template of transformers writes to ask about a picture.

    Raises:
        ValueError: it takes no message with a picture.
    """
    try:
        text = tokenizer.apply_chat_template(
            user_turn([None], "Q"), chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template of the source takes no message with a picture ({error}); give one with --template FILE"
        ) from error
    return str(text).replace(MARK, "").removeprefix(str(tokenizer.bos_token))


def _bare(processor: Processor, text: str) -> str:
    return text.removeprefix(str(processor.tokenizer.bos_token))


def prompt_difference(processor: Processor, tokenizer: Any, theirs: str) -> list[str]:
    """A note if the same prompt gives other tokens than the source's tokenizer makes of it in one piece."""
    question = "What is in the picture?"
    messages = user_turn([None], question)
    ours = processor.encode_prompt(messages).input_ids
    text = tokenizer.apply_chat_template(messages, chat_template=theirs, add_generation_prompt=True, tokenize=False)
    one = text.replace(IMAGE_TEXT, IMAGE_TEXT * processor.num_image_tokens)
    source: Sequence[int] = tokenizer(one, add_special_tokens=not one.startswith(str(tokenizer.bos_token))).input_ids
    if list(source) == ours:
        return []
    return [
        f"the prompt of {question!r} is {len(ours)} tokens here and {len(source)} in the source: eyespot never joins "
        "typed text with the template around it, so a space or line break may be another token"
    ]
