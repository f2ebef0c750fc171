"""Lightning checkpoints of models in three parts, such as gemma270m-llava's, by a table of names.

A checkpoint is a file of ``torch.save`` with the tensors of a LightningModule under ``state_dict`` and its arguments
under ``hyper_parameters``. Source: https://lightning.ai/docs/pytorch/stable/common/checkpointing_basic.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyespot.compose import CHECKPOINT_FILE, build_from_settings, load_parts
from eyespot.config import ConnectorSettings, LanguageSettings, LoraSettings, ModelSettings, VisionSettings
from eyespot.importing import Imported, Table, choose_dtype, load_pickle, renamed
from eyespot.models.vlm import VLM

# transformers before 5 has vision_model in the names of a CLIP, peft base_model.model in those of all it adapts
TABLE: Table = (
    ("model.vision_encoder.vision_model.", "vision."),
    ("model.vision_encoder.", "vision."),
    ("model.vision_projector.projector.", "connector.layers."),
    ("model.vision_projector.", "connector.layers."),
    ("model.projector.", "connector.layers."),
    ("model.language_model.base_model.model.", "language."),
    ("model.language_model.", "language."),
)
CURE = "say where they belong with --rename old=new (beginnings of names; an empty new leaves a tensor out)"
STATE = ".quant_state.bitsandbytes__"
DROPOUT = 0.1  # of gemma270m-llava's projector, which it does not write down
LORA = ("r", "alpha", "dropout", "target_modules")
HYPER_PARAMETERS = ("hyper_parameters", "model_config", "config")


def import_lightning(
    source: str,
    *,
    settings: Sequence[str] = (),
    vision: str | None = None,
    language: str | None = None,
    rename: Sequence[str] = (),
    dtype: str = "auto",
) -> Imported:
    """A .ckpt file of Lightning, or a checkpoint folder of one of our runs.

    Args:
        settings: what the model is made of, ``["recipe=NAME", "model.connector.args.hidden_dim=1536"]``; by default
            what gemma270m-llava wrote into its checkpoint.
        vision, language: folders of the pretrained parts instead of the names there.
        rename: ``"old=new"`` beginnings of names, tried before TABLE. dtype: of the frozen parts, "auto" is the file's.

    Raises:
        ValueError: the file holds more than tensors and plain values, its parts are unknown, or a tensor is missing,
            left over or of another shape.
    """
    path = Path(source)
    if path.is_dir():
        return own_checkpoint(path, [*settings, *rename, *filter(None, (vision, language))])
    checkpoint = read_checkpoint(path)
    table = [*map(parse_rename, rename), *TABLE]
    tensors = unpack_4bit(renamed(checkpoint["state_dict"], table, source, CURE))
    parts = parts_from(settings) if settings else described_parts(checkpoint, tensors, source)
    base = choose_dtype((t for name, t in tensors.items() if "lora_" not in name), dtype)
    model, processor = build_from_settings(with_folders(parts, vision, language, str(base).removeprefix("torch.")))
    tensors, notes = without_added_tokens(tensors, model, len(processor.tokenizer), source)
    notes += place(model, tensors, source)
    return Imported(model.eval(), processor, notes)  # type: ignore[no-untyped-call]


def own_checkpoint(folder: Path, options: Sequence[str]) -> Imported:
    """A checkpoint folder of ours as a whole model."""
    if not (folder / CHECKPOINT_FILE).is_file():
        raise ValueError(f"{str(folder)!r} has no {CHECKPOINT_FILE}; give a .ckpt file or a checkpoint folder of a run")
    if options:
        raise ValueError(f"a checkpoint folder knows its parts; leave {options[0]!r} out")
    return Imported(*load_parts(folder), [])


# --- the file --------------------------------------------------------------------------------------------------------


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a .ckpt, its tensors under ``state_dict``.

    Raises:
        ValueError: no file, or no tensors in it.
    """
    if not file.is_file():
        raise ValueError(f"{str(file)!r} does not exist; give a .ckpt file")
    checkpoint = load_pickle(file)
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else [type(checkpoint).__name__]
    tensors = next((checkpoint[key] for key in ("state_dict", "model_state_dict") if key in found), None)
    if tensors is None:
        raise ValueError(
            f"{str(file)!r} is no Lightning checkpoint: it has no 'state_dict' but {', '.join(found)[:200]}"
        )
    if not tensors:
        raise ValueError(
            f"{str(file)!r} holds the state of an optimizer but no weights; of a run of eyespot give the folder it "
            "lies in"
        )
    return {**checkpoint, "state_dict": tensors}


def parse_rename(word: str) -> tuple[str, str | None]:
    """``"old=new"``; nothing behind the sign leaves a tensor out."""
    old, equals, new = word.partition("=")
    if not equals or not old:
        raise ValueError(f"--rename is {word!r}; write old=new")
    return old, new or None


def unpack_4bit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that bitsandbytes packed (QLoRA, arXiv 2305.14314, section 3) as the values that they stand for.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes, QuantState in functional.py: two codes a byte, the
    first in its upper half; a scale for each block, itself in eight bits if packed twice.
    """
    packed = {name.partition(STATE)[0] for name in tensors if STATE in name}
    plain = {name: t for name, t in tensors.items() if not any(name.startswith(weight) for weight in packed)}
    return {**plain, **{name: _unpacked(tensors, name) for name in packed}}


def _unpacked(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    state = next(tensor for key, tensor in tensors.items() if key.startswith(name + STATE))
    settings = json.loads(bytes(state.tolist()))
    scales = tensors[f"{name}.absmax"]
    if "nested_blocksize" in settings:
        values = tensors[f"{name}.nested_quant_map"][scales.long()]
        blocks = tensors[f"{name}.nested_absmax"].repeat_interleave(settings["nested_blocksize"])
        scales = values * blocks[: len(values)] + settings["nested_offset"]
    codes = tensors[name].flatten()
    shape = torch.Size(settings["shape"])
    values = tensors[f"{name}.quant_map"][torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    scaled = values[: shape.numel()] * scales.repeat_interleave(settings["blocksize"])[: shape.numel()]
    return scaled.view(shape).to(getattr(torch, settings["dtype"]))


# --- the parts -------------------------------------------------------------------------------------------------------


def parts_from(words: Sequence[str]) -> ModelSettings:
    """The model of a recipe."""
    from eyespot.training.run import compose_settings

    return compose_settings(words).model


def described_parts(checkpoint: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> ModelSettings:
    """What gemma270m-llava says of its parts: names of the pretrained ones, and LoRA.

    Raises:
        ValueError: nothing of that kind is in the checkpoint.
    """
    found = [checkpoint[key] for key in HYPER_PARAMETERS if isinstance(checkpoint.get(key), Mapping)]
    configs = [config.get("config", config) for config in found]
    described = next((c["model"] for c in configs if "gemma_model_name" in c.get("model", {})), None)
    lora = (described or {}).get("lora", {})
    if described is None or "connector.layers.0.weight" not in tensors or any(key not in lora for key in LORA):
        keys = ", ".join(sorted(str(key) for config in configs for key in config)) or "none"
        raise ValueError(
            f"{source!r} does not say what its parts are (hyper-parameters: {keys[:200]}); add recipe=NAME and "
            "settings, as for eyespot train"
        )
    hidden_dim = tensors["connector.layers.0.weight"].shape[0]
    return ModelSettings(
        vision=VisionSettings("pretrained", {"source": described["vision_model_name"]}),
        connector=ConnectorSettings("mlp", {"hidden_dim": hidden_dim, "dropout": DROPOUT}),
        language=LanguageSettings(
            "pretrained",
            {"source": described["gemma_model_name"]},
            train="lora",
            lora=LoraSettings(*(lora[key] for key in LORA)),
            template="plain",
        ),
    )


def with_folders(settings: ModelSettings, vision: str | None, language: str | None, dtype: str) -> ModelSettings:
    """The settings with pretrained parts from these folders, frozen weights in this dtype."""

    def part(part: Any, folder: str | None) -> Any:
        if folder is not None:
            part = replace(part, name="pretrained", args={"source": folder})
        return replace(part, dtype="float32" if part.train == "full" else dtype)

    return replace(settings, vision=part(settings.vision, vision), language=part(settings.language, language))


# --- the tensors -----------------------------------------------------------------------------------------------------


def without_added_tokens(
    tensors: Mapping[str, Tensor], model: VLM, num_tokens: int, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Embedding and head without the row of ``<image>``, which gemma270m-llava adds to its vocabulary and never reads.

    Raises:
        ValueError: there are rows for more words than the tokenizer and one picture token have.
    """
    kept, notes = dict(tensors), []
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {end.weight.data_ptr() for end in ends}
    for name, ours in model.state_dict().items():
        theirs = tensors.get(name)
        if theirs is None or ours.data_ptr() not in weights or len(theirs) <= len(ours):
            continue
        if len(theirs) > num_tokens + 1:
            raise ValueError(
                f"{source!r} has {len(theirs)} tokens in {name!r}, but the tokenizer {num_tokens}; give the folder of "
                "a language model whose tokenizer has the added ones with --language"
            )
        kept[name] = theirs[: len(ours)]
        notes.append(f"{name}: {len(theirs) - len(ours)} rows of added tokens are left out")
    return kept, notes


@torch.no_grad()
def place(model: VLM, tensors: Mapping[str, Tensor], source: str) -> list[str]:
    """Copy tensors into a model; what was trained must all be there, and of a frozen part all or nothing.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    ours = model.state_dict()
    if strange := sorted(set(tensors) - set(ours)):
        raise ValueError(
            f"{source!r} has {len(strange)} tensors that this model has not, first {strange[0]!r} (under our name); "
            f"name the parts that it was trained with, or {CURE}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != ours[name].shape:
            raise ValueError(
                f"{source!r} has {name!r} as {list(tensor.shape)}, this model as {list(ours[name].shape)}; name the "
                "parts that it was trained with"
            )
        ours[name].copy_(tensor)
    return check_parts(model, set(tensors), source)


def check_parts(model: VLM, given: set[str], source: str) -> list[str]:
    """Raise ValueError if a part came by halves; returns a note for each that did not come at all."""
    notes = []
    tied = {t.data_ptr() for name, t in model.state_dict().items() if name in given}
    names = [name for name, t in model.state_dict().items() if name in given or t.data_ptr() not in tied]
    for part in ("vision", "connector", "language"):
        own = [name for name in names if name.startswith(f"{part}.")]
        frozen = {name for name in own if "lora_" not in name} if part != "connector" else set()
        missing = sorted(set(own) - given)
        if frozen and not frozen & given:
            notes.append(f"{part}: no weights in the checkpoint, they are those of the pretrained part")
            missing = sorted(set(missing) - frozen)
        if missing:
            raise ValueError(
                f"{source!r} lacks {len(missing)} tensors of the {part} part, first {missing[0]!r} (under our name); "
                f"name the parts that it was trained with, or {CURE}"
            )
    return notes
