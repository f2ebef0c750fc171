"""Models of other projects as folders of ours: every tensor under our name for it, none missing, none left over.

A format is a function in ``eyespot.registry.IMPORTS``::

    import_x(source: str, ...) -> Imported

Its keyword arguments are the options of ``eyespot import x``. Nothing of the source is executed: JSON, safetensors, and
pickles that hold tensors and plain values only.
"""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from eyespot.compose import (
    build_processor,
    check_head,
    picture_size,
    save,
    set_generation_defaults,
)
from eyespot.config import ConnectorSettings, LanguageSettings, ModelSettings, VisionSettings
from eyespot.files import make_folder
from eyespot.models.vision.pretrained import token_counts, without_late_layers, without_pooler
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.processor import Processor
from eyespot.registry import IMPORTS

# computed again when a model is built; files of older versions of their projects hold them
BUFFERS = ("inv_freq", "position_ids")
DTYPES = ("auto", "float32", "bfloat16")
Table = Sequence[tuple[str, str | None]]
"""Beginnings of names, and what takes their place: the first that fits counts, None leaves the tensor out."""


class Imported(NamedTuple):
    """A model, its processor, and what a user should know about how it became ours, one line each."""

    model: VLM
    processor: Processor
    notes: list[str]


@dataclass
class Blueprint:
    """What a model is made of, before its tensors: see VLMConfig. ``template``: Jinja, as in LanguageSettings."""

    vision_config: Any
    text_config: Any
    connector: dict[str, Any]
    image_processor: Any
    tokenizer: PreTrainedTokenizerBase
    template: str
    image_mode: str = "placeholder"
    vision_layer: int | None = None
    keep_cls: bool = False
    image_token_id: int | None = None
    unused: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Leave out what is not read of the encoder; ``unused`` are the names of its tensors."""
        with torch.device("meta"):
            encoder = AutoModel.from_config(self.vision_config)
        whole = set(encoder.state_dict())
        self.vision_layer = without_late_layers(without_pooler(encoder), self.vision_layer)
        self.vision_config = encoder.config
        self.unused = frozenset(whole - set(encoder.state_dict()))

    def config(self, dtype: torch.dtype) -> VLMConfig:
        """The configuration of the whole, without the number of image tokens."""
        prefix, _ = token_counts(self.vision_config, picture_size(self.image_processor))
        vocabulary = max(int(self.text_config.vocab_size), len(self.tokenizer))
        return VLMConfig(
            vision_config=self.vision_config,
            text_config=self.text_config,
            connector=self.connector,
            image_token_id=vocabulary if self.image_token_id is None else self.image_token_id,
            vision_layer=self.vision_layer,
            keep_cls=self.keep_cls,
            num_prefix_tokens=prefix,
            dtype=dtype,
            tie_word_embeddings=bool(self.text_config.tie_word_embeddings),
        )


def import_model(kind: str, source: str, out: str | Path, **options: Any) -> list[str]:
    """Write a model of another project as a folder for ``eyespot.load``; returns the notes of its importer.

    Args:
        kind: a name in IMPORTS. source: folder, file or Hub name. out: a folder that does not exist yet.
        options: arguments of the importer; None is one that was not given.

    Raises:
        ValueError: the folder exists, the importer has no such option, or the source cannot be imported.
    """
    importer = IMPORTS[kind]
    if Path(out).exists():
        raise ValueError(f"{str(out)!r} exists already; delete it or choose another folder")
    given = {name: value for name, value in options.items() if value not in (None, [])}
    known = list(inspect.signature(importer).parameters)[1:]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"import {kind} has no option {unknown[0]!r}; it takes {', '.join(known)}")
    imported: Imported = importer(source, **given)
    make_folder(Path(out), lambda folder: save(imported.model, imported.processor, folder))
    return imported.notes


def assemble(blueprint: Blueprint, tensors: Mapping[str, Tensor], source: str, dtype: str = "auto") -> Imported:
    """Put tensors that have our names into the model of a blueprint.

    Args:
        dtype: of the result; "auto" is bfloat16 if everything is, else float32 (float16 is made longer, not rounded).

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    config = blueprint.config(choose_dtype(tensors.values(), dtype))
    used = {name: tensor for name, tensor in tensors.items() if not _is_unused(name, blueprint.unused)}
    loaded: Any = VLM.from_pretrained(
        None,
        config=config,
        state_dict=used,
        dtype=config.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_placed refuses them, and names the first
    )
    model, info = loaded
    check_placed(info, source)
    _, patches = token_counts(config.vision_config, picture_size(blueprint.image_processor))
    model.config.num_image_tokens = model.connector.num_tokens(patches + config.num_prefix_tokens * config.keep_cls)
    check_head(model)
    settings = ModelSettings(
        vision=VisionSettings("pretrained"),
        connector=ConnectorSettings(blueprint.connector["name"]),
        language=LanguageSettings("pretrained", template=blueprint.template),
        image_mode=blueprint.image_mode,  # type: ignore[arg-type]
    )
    _keep_padding_inside(blueprint.tokenizer, model.get_input_embeddings().num_embeddings)
    processor = build_processor(model, blueprint.tokenizer, blueprint.image_processor, settings)
    set_generation_defaults(model, processor)
    return Imported(model.eval(), processor, [])


def _keep_padding_inside(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """A tokenizer may have a padding token that the model has no row for (llava-hf's beside the authors' weights). What
    is padded is never looked at, so any other token does."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= num_embeddings:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _is_unused(name: str, unused: frozenset[str]) -> bool:
    """Of a tensor under our name; older versions of transformers call the whole encoder vision_model once more."""
    part, _, rest = name.partition(".")
    return part == "vision" and rest.removeprefix("vision_model.") in unused


def choose_dtype(tensors: Iterable[Tensor], dtype: str) -> torch.dtype:
    """float32 or bfloat16, the two that models of ours have."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}")
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else torch.bfloat16
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return torch.bfloat16 if found == {torch.bfloat16} else torch.float32


def check_placed(info: Mapping[str, Any], source: str) -> None:
    """Raise ValueError if a tensor was missing, left over or of another shape, in transformers' loading info."""
    words = {"missing_keys": "missing", "unexpected_keys": "left over", "mismatched_keys": "of another shape"}
    for kind, what in words.items():
        if problems := info.get(kind):
            names = sorted(str(name if isinstance(name, str) else name[0]) for name in problems)
            raise ValueError(
                f"{source!r} does not hold the model that its configuration describes: {len(names)} tensors {what}, "
                f"first {names[0]!r} (under our name); fetch the folder again, or give the configuration that belongs "
                "to these weights"
            )


# --- files -----------------------------------------------------------------------------------------------------------


def source_folder(source: str) -> Path:
    """The folder itself, or what the Hub has under that name: JSON, tokenizer and weights, never code.

    Raises:
        ValueError: no such folder, and the Hub cannot be read.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    texts = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(source, allow_patterns=[*texts, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=["pytorch_model*.bin"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{source!r} is neither a folder nor a Hub name that can be read ({first})") from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise ValueError(f"{str(folder)!r} has no config.json (it holds {found}); give the folder of a whole model")
    config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(  # noqa: TRY004  bad data is always a ValueError
            f"{str(file)!r} holds a {type(config).__name__}; a configuration is an object of JSON"
        )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: model*.safetensors, or else pytorch_model*.bin.

    Raises:
        ValueError: neither is there, two files hold the same name, or a pickle holds more than plain values.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{str(folder)!r} has no weights; expected model*.safetensors or pytorch_model*.bin")
    tensors: dict[str, Tensor] = {}
    for file in files:
        new = load_file(file) if file.suffix == ".safetensors" else load_pickle(file)
        if doubled := sorted(set(tensors) & set(new)):
            raise ValueError(f"{doubled[0]!r} is in {file.name!r} and in a file before it; keep one set of weights")
        tensors |= new
    return tensors


def load_pickle(file: Path) -> Any:
    """A file of ``torch.save`` that holds tensors and plain values only.

    Raises:
        ValueError: it holds anything else, which could run code, or is no such file.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "it cannot be read")
        raise ValueError(
            f"{str(file)!r} is refused: {wanted.partition(' was not')[0]}. Such a pickle could run code of its maker; "
            "ask for safetensors, or save the state_dict alone again where you trust it"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{str(file)!r} is no file of torch.save ({first}); is the download complete?") from error


def renamed(tensors: Mapping[str, Tensor], table: Table, source: str, cure: str) -> dict[str, Tensor]:
    """Tensors under our names.

    Args:
        table: see Table. cure: what the user can do about a name that no line of it fits.

    Raises:
        ValueError: some names fit no line, or two tensors get the same name.
    """
    ours: dict[str, Tensor] = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        if name.endswith(BUFFERS):
            continue
        old, new = next(((old, new) for old, new in table if name.startswith(old)), (None, None))
        if old is None:
            strange.append(name)
        elif new is not None:
            place = new + name.removeprefix(old)
            if place in ours:
                raise ValueError(f"{source!r} has two tensors for {place!r}, the second is {name!r}; {cure}")
            ours[place] = tensor
    if strange:
        raise ValueError(f"{source!r} has {len(strange)} tensors without a place, first {min(strange)!r}; {cure}")
    return ours


def tokenizer_of(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"no tokenizer in {str(name)!r} ({first}); give a folder of one with --tokenizer") from error
    return tokenizer
