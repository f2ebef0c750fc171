"""Parts to a model and its processor, and back from a folder: the place where models and processing meet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eyespot.config import (
    ConnectorSettings,
    LanguageSettings,
    ModelSettings,
    VisionSettings,
    check_model,
    from_dict,
    to_dict,
)
from eyespot.devices import choose_device, has_fast_bfloat16
from eyespot.models.loss import head_logits
from eyespot.models.vision.pretrained import image_size_of, token_counts
from eyespot.models.vision.vit import EyespotViTConfig
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.images import EyespotImageProcessor
from eyespot.processing.processor import Processor
from eyespot.processing.prompt import TEMPLATES
from eyespot.processing.tokenizers import byte_tokenizer, char_tokenizer
from eyespot.registry import LANGUAGES, VISION

# families whose models degenerate without BOS although some of their tokenizers add none
# (Gemma: ai.google.dev/gemma/docs/core/prompt-structure)
NEEDS_BOS = ("gemma", "gemma2", "gemma3_text")

AutoProcessor.register(VLMConfig, Processor)
# transformers finds the class by its name; the configuration only opens the register
AutoImageProcessor.register(
    EyespotViTConfig,
    image_processor_classes={"pil": EyespotImageProcessor, "torchvision": EyespotImageProcessor},
    exist_ok=True,
)


def build(
    vision: VisionSettings | Mapping[str, Any],
    connector: ConnectorSettings | Mapping[str, Any],
    language: LanguageSettings | Mapping[str, Any],
    image_mode: str = "placeholder",
) -> tuple[VLM, Processor]:
    """A model and its processor from three parts.

    Args:
        vision, connector, language: settings, or plain mappings such as
            ``{"name": "vit", "args": {"image_size": 64}, "train": "full"}``.
        image_mode: "placeholder" or "prefix".

    Raises:
        ConfigError: a setting is unknown or does not fit.
    """
    values = {
        "vision": _plain(vision), "connector": _plain(connector), "language": _plain(language), "image_mode": image_mode
    }  # fmt: skip
    return build_from_settings(from_dict(ModelSettings, values, "model"))


def _plain(settings: Any) -> Any:
    return settings if isinstance(settings, Mapping) else to_dict(settings)


def build_from_settings(settings: ModelSettings) -> tuple[VLM, Processor]:
    """A model and its processor from checked settings; trainable parts are float32, as the optimizer needs them."""
    check_model(settings)
    settings = with_dtypes(settings)
    vision = _load_vision(settings.vision)
    language, tokenizer = _load_language(settings.language)
    prefix, patches = token_counts(vision.config)
    config = VLMConfig(
        vision_config=vision.config,
        text_config=language.config,
        connector={"name": settings.connector.name, **settings.connector.args},
        image_token_id=max(int(language.config.get_text_config().vocab_size), len(tokenizer)),
        vision_layer=settings.vision.layer,
        keep_cls=settings.vision.keep_cls,
        num_prefix_tokens=prefix,
        lora={
            name: to_dict(part.lora)
            for name, part in (("vision", settings.vision), ("language", settings.language))
            if part.lora is not None
        },
        dtype=torch.bfloat16 if torch.bfloat16 in (vision.dtype, language.dtype) else torch.float32,
        tie_word_embeddings=bool(getattr(language.config, "tie_word_embeddings", False)),
    )
    model = VLM(config, vision=vision, language=language)
    config.num_image_tokens = model.connector.num_tokens(patches + prefix * settings.vision.keep_cls)  # type: ignore[operator]
    config.float32_parts = [
        part
        for part in ("vision", "connector", "language")
        if next(p for n, p in getattr(model, part).named_parameters() if "lora_" not in n).dtype == torch.float32
    ]
    check_head(model)
    model.set_trainable(
        vision=settings.vision.train, connector=settings.connector.train, language=settings.language.train
    )
    processor = build_processor(model, tokenizer, settings)
    set_generation_defaults(model, processor)
    return model, processor


def _load_vision(settings: VisionSettings) -> PreTrainedModel:
    factory = VISION[settings.name]
    if settings.name == "pretrained":
        return factory(**settings.args, dtype=_dtype(settings))  # type: ignore[no-any-return]
    return factory(**settings.args).to(_dtype(settings))  # type: ignore[no-any-return]


def with_dtypes(settings: ModelSettings, device: torch.device | None = None) -> ModelSettings:
    """The settings with every dtype "auto" decided: frozen weights in bfloat16 where it is fast, float32 elsewhere."""
    fast = has_fast_bfloat16(device or choose_device())

    def decide(part: Any) -> Any:
        if part.dtype != "auto":
            return part
        return replace(part, dtype="bfloat16" if fast and part.train != "full" else "float32")

    return replace(settings, vision=decide(settings.vision), language=decide(settings.language))


def _dtype(settings: VisionSettings | LanguageSettings) -> torch.dtype:
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def _load_language(settings: LanguageSettings) -> tuple[Any, PreTrainedTokenizerBase]:
    factory = LANGUAGES[settings.name]
    if settings.name in ("pretrained", "gguf"):
        model, tokenizer = factory(**settings.args, dtype=_dtype(settings))
        return model, load_tokenizer(settings.tokenizer) if settings.tokenizer else tokenizer
    tokenizer = load_tokenizer(settings.tokenizer or "byte")
    model = factory(**{"vocab_size": len(tokenizer), **settings.args}).to(_dtype(settings))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    return model, tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """ "byte", "char:LETTERS", or the name or folder of any tokenizer of transformers.

    Raises:
        ValueError: "bpe:SIZE", which only a training run can make.
    """
    if name.startswith("bpe:"):
        raise ValueError(f"tokenizer {name!r} is learned from training texts; start from a recipe, or give a folder")
    if name == "byte":
        return byte_tokenizer()
    if name.startswith("char:"):
        return char_tokenizer(name.removeprefix("char:"))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def build_processor(model: VLM, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> Processor:
    """The processor that fits a model: its encoder's image processor, its language model's tokenizer and template."""
    config = model.config
    language = settings.language
    if language.template == "auto":
        template = tokenizer.chat_template or TEMPLATES["plain"]
    else:
        template = TEMPLATES.get(language.template, language.template)
    add_bos = language.add_bos
    if add_bos is None:
        # a template that writes BOS itself is left to do so; a row never gets a second one
        by_itself = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        add_bos = tokenizer.bos_token_id is not None and (
            by_itself or config.text_config.model_type in (*NEEDS_BOS, "eyespot_gpt")
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Processor(
        image_processor=image_processor_for(settings.vision, config.vision_config),
        tokenizer=tokenizer,
        chat_template=template,
        image_token_id=config.image_token_id,
        num_image_tokens=config.num_image_tokens,
        image_mode=settings.image_mode,
        add_bos=add_bos,
        template_kwargs=language.template_kwargs,
    )


def image_processor_for(settings: VisionSettings, vision_config: Any) -> Any:
    """The encoder's own image processor: made from a configuration that names mean and deviation (ours do), else the
    one saved beside the weights."""
    if hasattr(vision_config, "image_mean"):
        return EyespotImageProcessor(
            size=image_size_of(vision_config),
            resize_mode=settings.resize,
            image_mean=list(vision_config.image_mean),
            image_std=list(vision_config.image_std),
        )
    return AutoImageProcessor.from_pretrained(settings.args["source"])


def set_generation_defaults(model: VLM, processor: Processor) -> None:
    """Generation stops at the end of a turn and pads with the tokenizer's own token."""
    ends = {processor.end_of_turn_id, processor.tokenizer.eos_token_id} - {None}
    model.generation_config.eos_token_id = sorted(ends)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.bos_token_id = processor.tokenizer.bos_token_id


@torch.no_grad()
def check_head(model: VLM) -> None:
    """Compare our logits with the language model's own on a few tokens.

    Raises:
        ValueError: the language model does something after its head that eyespot does not know.
    """
    language = model.language
    ids = torch.arange(4).unsqueeze(0) % language.config.get_text_config().vocab_size
    was_training = language.training
    language.eval()
    own = language(input_ids=ids.to(language.device)).logits
    ours = head_logits(language, language.base_model(input_ids=ids.to(language.device)).last_hidden_state)
    language.train(was_training)
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise ValueError(
            f"{type(language).__name__} changes its logits after the head in a way that eyespot does not follow; "
            "teach it to eyespot.models.loss.head_logits"
        )


# --- checkpoints of a run ----------------------------------------------------------------------------------------

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
CHECKPOINT_FILE = "checkpoint.json"
TRAINED_FILE = "trained.safetensors"


def trained_tensors(model: VLM) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def frozen_hash(model: VLM) -> str:
    """``tensors_hash`` of every tensor that training leaves alone."""
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}  # a tied weight has two names
    return tensors_hash({name: t for name, t in model.state_dict().items() if t.data_ptr() not in trained})


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def load_checkpoint(folder: Path) -> tuple[VLM, Processor]:
    """A checkpoint of a run: the frozen parts built again and verified, the trained tensors put over them.

    Raises:
        ValueError: the frozen parts are not those of the run, or the tensors do not fit.
    """
    record = json.loads((folder / CHECKPOINT_FILE).read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record["seed"])  # a frozen part may be random: it is drawn again
        settings = from_dict(ModelSettings, record["model"], "model")
        if (name := settings.language.tokenizer) and name != "byte" and not name.startswith("char:"):
            settings.language.tokenizer = str(folder)  # a checkpoint carries its own
        model, _ = build_from_settings(settings)
    load_trained(model, folder)
    if (found := frozen_hash(model)) != record["frozen_sha256"]:
        raise ValueError(
            f"the frozen parts of checkpoint {str(folder)!r} have changed since the run (SHA-256 {found[:12]}… instead "
            f"of {record['frozen_sha256'][:12]}…); use the run's final model folder, or the parts it was trained with"
        )
    model.config.image_scale = VLMConfig.from_pretrained(folder).image_scale
    return model.eval(), AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]


def load_trained(model: VLM, folder: Path) -> None:
    """Put the trained tensors of a checkpoint into a model that was composed the same way.

    Raises:
        ValueError: the checkpoint's tensors are not exactly the trainable ones of the model.
    """
    tensors = load_file(folder / TRAINED_FILE)
    if difference := sorted(set(trained_tensors(model)) ^ set(tensors)):
        raise ValueError(
            f"checkpoint {str(folder)!r} does not fit the model: {len(difference)} tensors differ, first "
            f"{difference[0]!r}; compose the model with the settings of that run"
        )
    model.load_state_dict(tensors, strict=False)


# --- folders -----------------------------------------------------------------------------------------------------


def save(model: VLM, processor: Processor, folder: str | Path) -> None:
    """Model and processor as one transformers folder (safetensors and JSON).

    Raises:
        ValueError: the model's layers were rounded to int8, which no folder of transformers can hold.
    """
    if any(parameter.dtype == torch.int8 for parameter in model.parameters()):
        raise ValueError(
            "a model in int8 is for answering and cannot be saved; load it with dtype=float32 and save that"
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_parts(folder: str | Path, dtype: str | torch.dtype = "auto") -> tuple[VLM, Processor]:
    """Model and processor from a transformers folder, strictly.

    Args:
        folder: what ``save`` wrote, a checkpoint of a run, or a Hub name.
        dtype: "auto" as saved, part by part; "float32"; "bfloat16" for everything but adapters.

    Raises:
        ValueError: no such folder, not an eyespot model, or its tensors are not exactly those of its configuration.
    """
    path = Path(folder)
    if (path / CHECKPOINT_FILE).is_file():
        return load_checkpoint(path)
    if path.is_file():
        what = "a pickle can run any code when it is loaded" if path.suffix in PICKLES else "a single file is no model"
        raise ValueError(f"{str(folder)!r}: {what}; give a folder with config.json and model.safetensors")
    config_file = path / "config.json"
    if path.exists() and not config_file.is_file():
        raise ValueError(f"{str(folder)!r} has no config.json; give the folder that training wrote (…/model)")
    if config_file.is_file():
        kind = json.loads(config_file.read_text()).get("model_type")
        if kind != VLMConfig.model_type:
            raise ValueError(f"{str(folder)!r} holds a model of type {kind!r}, not {VLMConfig.model_type!r}")
    try:
        config = VLMConfig.from_pretrained(str(folder))
        if dtype != "auto":
            config.float32_parts = []
        loaded: Any = VLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loading refuses them, and names the first
            use_safetensors=True,
        )
        processor = AutoProcessor.from_pretrained(str(folder))
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{str(folder)!r} is neither a model folder nor a readable Hub name ({first})") from error
    model, info = loaded
    check_loading(info, str(folder))
    return model.eval(), processor


def check_loading(info: Mapping[str, Any], folder: str) -> None:
    """Raise ValueError if a tensor was missing, left over or of another shape."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if problems := info.get(kind):
            names = [str(p[0] if isinstance(p, tuple) else p) for p in problems]
            raise ValueError(
                f"{folder!r} does not fit its configuration: {len(names)} {kind.replace('_', ' ')}, first "
                f"{sorted(names)[0]!r}; the folder is damaged or was edited, train or export it again"
            )


__all__ = ["build", "build_from_settings", "load_parts", "save"]
