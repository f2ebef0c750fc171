"""nanoVLM 0.1: one picture before the words, such as lusxvr/nanoVLM-222M.

Source: https://github.com/huggingface/nanoVLM, files models/*.py and data/*.py of version 0.1 (May 2025). Its vision
encoder computes what SigLIP's does, its language model what Llama's does, under names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, SiglipVisionConfig

from eyespot.importing import (
    Blueprint,
    Imported,
    assemble,
    read_config,
    read_tensors,
    renamed,
    source_folder,
    tokenizer_of,
)
from eyespot.processing.images import EyespotImageProcessor

# https://github.com/huggingface/nanoVLM/blob/v0.1/data/datasets.py: no word between "Answer:" and what is learned
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% elif m.role == 'user' %}{{ m.images }}{{ 'Question: ' }}{{ m.text }}{{ ' Answer:' }}"
    "{% else %}{{ m.content }}{{ '\\n' }}{% endif %}{% endfor %}"
)
BILINEAR = 2  # Pillow's code; torchvision's Resize, which nanoVLM uses, has it as default
# what later versions added: pictures cut into tiles, and tokens that say which tile follows
LATER = ("vlm_extra_tokens", "max_img_size", "extra_token_amount")
# of the values that change what is computed, those that our parts compute
FIXED = {"vit_cls_flag": False, "lm_use_tokens": False, "lm_attn_scaling": 1.0}
VISION = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
LANGUAGE = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj", "attn.out_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj",
}  # fmt: skip


def import_nanovlm(source: str, *, tokenizer: str | None = None, dtype: str = "auto") -> Imported:
    """A nanoVLM folder (config.json and model.safetensors) or Hub name.

    Args:
        tokenizer: folder or Hub name; by default ``lm_tokenizer`` of the configuration. dtype: see ``assemble``.

    Raises:
        ValueError: another layout, or a tensor is missing, left over or of another shape.
    """
    folder = source_folder(source)
    config = read_config(folder)
    check_layout(config, source)
    blueprint = Blueprint(
        vision_config=vision_config(config),
        text_config=text_config(config),
        connector={"name": "pixel_shuffle", "factor": config["mp_pixel_shuffle_factor"]},
        # pixels between 0 and 1, as they are in nanoVLM, not normalised as SigLIP's own
        image_processor=EyespotImageProcessor(
            size=config["vit_img_size"], resample=BILINEAR, image_mean=(0, 0, 0), image_std=(1, 1, 1)
        ),
        tokenizer=tokenizer_of(tokenizer or config["lm_tokenizer"]),
        template=TEMPLATE,
        image_mode="prefix",
    )
    tensors = renamed(
        split_qkv(read_tensors(folder)),
        name_table(config["vit_n_blocks"], config["lm_n_blocks"]),
        source,
        "it is not the nanoVLM that its config.json describes",
    )
    return assemble(blueprint, one_embedding(tensors, config["lm_tie_weights"], source), source, dtype)


def check_layout(config: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless the configuration is one of nanoVLM 0.1."""
    needed = [
        "vit_hidden_dim", "vit_inter_dim", "vit_patch_size", "vit_img_size", "vit_n_heads", "vit_n_blocks",
        "vit_ln_eps", "lm_hidden_dim", "lm_inter_dim", "lm_rms_eps", "lm_re_base", "lm_max_position_embeddings",
        "lm_vocab_size", "lm_n_heads", "lm_n_kv_heads", "lm_n_blocks", "lm_tie_weights", "lm_tokenizer",
        "mp_pixel_shuffle_factor",
    ]  # fmt: skip
    if missing := [key for key in needed if key not in config]:
        kind = config.get("model_type", "no model_type")
        raise ValueError(
            f"{source!r} is no nanoVLM: its config.json ({kind}) lacks {missing[0]!r}; expected the keys vit_…, lm_… "
            "and mp_… of nanoVLM 0.1"
        )
    if later := [key for key in LATER if key in config]:
        raise ValueError(
            f"{source!r} is a nanoVLM later than 0.1 (its config.json has {later[0]!r}): it writes pictures "
            "into the text as tiles, and eyespot shows a picture as one square. Import a model of 0.1, such as "
            "lusxvr/nanoVLM-222M"
        )
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{source!r} has {key} {config[key]!r}; only {value!r} can be imported")


def vision_config(config: Mapping[str, Any]) -> SiglipVisionConfig:
    """The same encoder in transformers' terms."""
    return SiglipVisionConfig(
        hidden_size=config["vit_hidden_dim"],
        intermediate_size=config["vit_inter_dim"],
        num_hidden_layers=config["vit_n_blocks"],
        num_attention_heads=config["vit_n_heads"],
        image_size=config["vit_img_size"],
        patch_size=config["vit_patch_size"],
        layer_norm_eps=config["vit_ln_eps"],
        attention_dropout=config.get("vit_dropout", 0.0),
        hidden_act="gelu_pytorch_tanh",
    )


def text_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The same decoder in transformers' terms."""
    return LlamaConfig(
        vocab_size=config["lm_vocab_size"],
        hidden_size=config["lm_hidden_dim"],
        intermediate_size=config["lm_inter_dim"],
        num_hidden_layers=config["lm_n_blocks"],
        num_attention_heads=config["lm_n_heads"],
        num_key_value_heads=config["lm_n_kv_heads"],
        max_position_embeddings=config["lm_max_position_embeddings"],
        rms_norm_eps=config["lm_rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config["lm_re_base"])},
        attention_dropout=config.get("lm_dropout", 0.0),
        tie_word_embeddings=config["lm_tie_weights"],
    )


def name_table(num_vision: int, num_language: int) -> list[tuple[str, str]]:
    """nanoVLM's names, after ``split_qkv``, and ours."""
    encoder, decoder = "vision_encoder.blocks", "decoder.blocks"
    return [
        ("vision_encoder.patch_embedding.conv.", "vision.embeddings.patch_embedding."),
        ("vision_encoder.patch_embedding.position_embedding", "vision.embeddings.position_embedding.weight"),
        ("vision_encoder.layer_norm.", "vision.post_layernorm."),
        ("MP.proj.", "connector.proj."),
        ("decoder.token_embedding.", "language.model.embed_tokens."),
        ("decoder.norm.", "language.model.norm."),
        ("decoder.head.", "language.lm_head."),
        *[
            (f"{encoder}.{i}.{theirs}.", f"vision.encoder.layers.{i}.{ours}.")
            for i in range(num_vision)
            for theirs, ours in [*VISION.items(), *((f"attn.{x}_proj", f"self_attn.{x}_proj") for x in "qkv")]
        ],
        *[
            (f"{decoder}.{i}.{theirs}.", f"language.model.layers.{i}.{ours}.")
            for i in range(num_language)
            for theirs, ours in LANGUAGE.items()
        ],
    ]


def split_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of the encoder apart ([3E, E] -> 3 x [E, E]), and its positions [1, P, E] as [P, E]."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".qkv_proj." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace("qkv_proj", f"{letter}_proj")] = part.contiguous()
        else:
            split[name] = tensor.squeeze(0) if name.endswith("patch_embedding.position_embedding") else tensor
    return split


def one_embedding(tensors: Mapping[str, Tensor], tied: bool, source: str) -> dict[str, Tensor]:
    """Tied weights are saved under either of their names, or under both.

    Raises:
        ValueError: the two differ.
    """
    embedding, head = "language.model.embed_tokens.weight", "language.lm_head.weight"
    if not tied or head not in tensors:
        return dict(tensors)
    if embedding in tensors and not tensors[embedding].equal(tensors[head]):
        raise ValueError(f"{source!r} ties its head to its embedding (lm_tie_weights), but holds two different ones")
    kept = {name: tensor for name, tensor in tensors.items() if name != head}
    return {**kept, embedding: tensors[head]}
