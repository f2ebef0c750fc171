"""Parts to a model and its processor, and back from a folder: the place where models and processing meet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# by its module: up to 5.17 transformers gives the name out only beside torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from eyespot.config import (
    AlignmentSettings,
    ConfigError,
    ConnectorSettings,
    LanguageSettings,
    ModelSettings,
    VisionSettings,
    check_model,
    from_dict,
    to_dict,
)
from eyespot.devices import choose_device, has_fast_bfloat16
from eyespot.files import open_as_its_folder
from eyespot.models.attention import attention_argument
from eyespot.models.loss import head_logits
from eyespot.models.nf4 import check_nf4, is_nf4, unpacked_state_dict
from eyespot.models.vision.pretrained import image_size_of, token_counts, without_late_layers
from eyespot.models.vision.vit import EyespotViTConfig
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.images import EyespotImageProcessor
from eyespot.processing.processor import Processor
from eyespot.processing.prompt import TEMPLATES
from eyespot.processing.texts import TEXT_FOLDER, decode_id, with_ends
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
    image_attention: str = "causal",
    alignment: AlignmentSettings | Mapping[str, Any] | None = None,
) -> tuple[VLM, Processor]:
    """A model and its processor from three parts.

    Args:
        vision, connector, language: settings, or plain mappings such as
            ``{"name": "vit", "args": {"image_size": 64}, "train": "full"}``.
        image_mode: "placeholder" or "prefix". image_attention: "causal" or "bidirectional".
        alignment: settings of a head that compares pictures with texts, such as ``{"dim": 256}``.

    Raises:
        ConfigError: a setting is unknown or does not fit.
    """
    values = {
        "vision": _plain(vision),
        "connector": _plain(connector),
        "language": _plain(language),
        "image_mode": image_mode,
        "image_attention": image_attention,
        "alignment": None if alignment is None else _plain(alignment),
    }
    return build_from_settings(from_dict(ModelSettings, values, "model"))


def _plain(settings: Any) -> Any:
    return settings if isinstance(settings, Mapping) else to_dict(settings)


def build_from_settings(settings: ModelSettings) -> tuple[VLM, Processor]:
    """A model and its processor from checked settings; trainable parts are float32, as the optimizer needs them."""
    check_model(settings)
    if settings.language.quantize is not None:
        check_nf4()
    settings = with_dtypes(settings)
    vision = _load_vision(settings.vision)
    vision_layer = without_late_layers(vision, settings.vision.layer)
    language, tokenizer = _load_language(settings.language)
    text_tokenizer = _load_text_tokenizer(settings)
    image_processor = image_processor_for(settings.vision, vision.config)
    prefix, patches = token_counts(vision.config, picture_size(image_processor))
    if settings.vision.keep_cls and prefix == 0:
        raise ConfigError(
            f"model.vision.keep_cls is true, but {vision.config.model_type} gives no tokens before its patches; set it "
            "to false"
        )
    config = VLMConfig(
        vision_config=vision.config,
        text_config=language.config,
        connector={"name": settings.connector.name, **settings.connector.args, **_text_sizes(settings, text_tokenizer)},
        image_token_id=max(int(language.config.get_text_config().vocab_size), len(tokenizer)),
        vision_layer=vision_layer,
        keep_cls=settings.vision.keep_cls,
        vision_positions=settings.vision.positions,
        num_prefix_tokens=prefix,
        image_attention=settings.image_attention,
        lora={
            name: to_dict(part.lora)
            for name, part in (("vision", settings.vision), ("language", settings.language))
            if part.lora is not None
        },
        alignment=_alignment(settings, text_tokenizer),
        detection=settings.detection,
        dtype=torch.bfloat16 if torch.bfloat16 in (vision.dtype, language.dtype) else torch.float32,
        tie_word_embeddings=bool(getattr(language.config, "tie_word_embeddings", False)),
    )
    model = VLM(config, vision=vision, language=language)
    if hasattr(model.connector, "learn_digits") and settings.connector.args.get("boxes"):
        model.connector.learn_digits(*digit_embeddings(language, tokenizer))  # type: ignore[operator]
    config.num_image_tokens = model.connector.num_tokens(patches + prefix * settings.vision.keep_cls)  # type: ignore[operator]
    config.float32_parts = [
        part
        for part in ("vision", "connector", "language")
        if next(p for n, p in getattr(model, part).named_parameters() if "lora_" not in n).dtype == torch.float32
    ]
    check_head(model)
    if settings.image_attention == "bidirectional":
        check_image_attention(model)
    model.set_trainable(
        vision=settings.vision.train,
        connector=settings.connector.train,
        language=settings.language.train,
        alignment="frozen",  # stages train the heads
        detection="frozen",
    )
    processor = build_processor(model, tokenizer, image_processor, settings)
    if settings.alignment is not None:
        processor.max_text = settings.alignment.max_text
    if text_tokenizer is not None:
        processor.text_tokenizer, processor.text_folder = text_tokenizer, TEXT_FOLDER
    set_generation_defaults(model, processor)
    return model, processor


def digit_embeddings(language: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """How a language model embeds the digits, float32 [10, D], and the end of a line, float32 [D]."""
    embed = language.get_input_embeddings()
    ids = [tokenizer(text, add_special_tokens=False).input_ids[-1:] for text in (*"0123456789", "\n")]
    vectors = [embed(torch.tensor(one, device=embed.weight.device)).detach().float().sum(0) for one in ids]
    return torch.stack(vectors[:-1]), vectors[-1]


def _load_text_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the connector's text side, if texts are read there."""
    if settings.alignment is None or settings.alignment.tokenizer is None:
        return None
    return with_ends(load_tokenizer(settings.alignment.tokenizer))


def _text_sizes(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    if settings.alignment is None or tokenizer is None:
        return {}
    return {"text_vocab_size": len(tokenizer), "max_text": settings.alignment.max_text}


def _alignment(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int] | None:
    if settings.alignment is None:
        return None
    return {"dim": settings.alignment.dim} | ({} if tokenizer is None else {"decode_id": decode_id(tokenizer)})


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
        quantize = {"quantize": settings.quantize} if settings.quantize else {}
        model, tokenizer = factory(**settings.args, **quantize, dtype=_dtype(settings))
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
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return tokenizer


def build_processor(
    model: VLM, tokenizer: PreTrainedTokenizerBase, image_processor: Any, settings: ModelSettings
) -> Processor:
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
        image_processor=image_processor,
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
    one saved beside the weights. Of a fusion it is the first encoder's."""
    if settings.name == "fusion":
        first = dict(settings.args["first"])
        settings = replace(settings, name=first.pop("name"), args=first)
        return image_processor_for(settings, vision_config.first_config)
    if hasattr(vision_config, "image_mean"):
        return EyespotImageProcessor(
            size=image_size_of(vision_config),
            resize_mode=settings.resize,
            image_mean=list(vision_config.image_mean),
            image_std=list(vision_config.image_std),
        )
    return AutoImageProcessor.from_pretrained(settings.args["source"], trust_remote_code=False)


def picture_size(image_processor: Any) -> int:
    """Side of the pictures that an image processor makes, in pixels: of some encoders not the one they are known by
    (DINOv2 was trained at 518 and is given 224).

    Raises:
        ValueError: they are not square.
    """
    picture = PIL.Image.new("RGB", (64, 48))
    height, width = image_processor(images=[picture], return_tensors="pt")["pixel_values"].shape[-2:]
    if height != width:
        raise ValueError(
            f"the image processor makes pictures of {width} x {height} pixels; eyespot needs square ones, so set a "
            "crop or both sides in its preprocessor_config.json"
        )
    return int(width)


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


@torch.no_grad()
def check_image_attention(model: VLM) -> None:
    """Look whether the language model's first token changes when the mask lets it see the second.

    Raises:
        ValueError: it does not, or the language model takes no such mask.
    """
    language, device = model.language, model.language.device
    config = language.config.get_text_config()
    zeros, places, ahead = (torch.tensor([row], device=device) for row in ([0, 0], [0, 1], [1, 0]))
    embeds = language.get_input_embeddings()(places)  # [1, 2, D]
    positions = {"position_ids": places} if "position_ids" in model.language_inputs else {}

    def first_token(ahead: torch.Tensor) -> torch.Tensor:
        mask = attention_argument(config, zeros, zeros, places, embeds.dtype, ahead=ahead)
        outputs = language.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **positions)
        hidden: torch.Tensor = outputs.last_hidden_state[:, 0]
        return hidden

    was_training = language.training
    language.eval()
    try:
        obeys, reason = not torch.equal(first_token(zeros), first_token(ahead)), "it is ignored"
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        obeys, reason = False, str(error).strip().partition("\n")[0]
    language.train(was_training)
    if not obeys:
        raise ValueError(
            f"{type(language).__name__} does not follow a mask in which image tokens see each other ({reason}); "
            "set model.image_attention=causal"
        )


# --- checkpoints of a run ----------------------------------------------------------------------------------------

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
CHECKPOINT_FILE = "checkpoint.json"
EARLIER_FILE = "earlier.safetensors"
TRAINED_FILE = "trained.safetensors"


def trained_tensors(model: VLM) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name; of a model that is spread over processes the whole ones, and then
    every process must call this."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu().contiguous() for name, t in trained.items()}


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
        if settings.alignment is not None and settings.alignment.tokenizer not in (None, "byte"):
            settings.alignment.tokenizer = str(folder / TEXT_FOLDER)
        model, _ = build_from_settings(settings)
    if modes := record.get("train"):  # of a stage, which may train something else than the stages before
        model.set_trainable(**modes)
    load_earlier(model, folder)
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


def load_earlier(model: VLM, folder: Path) -> None:
    """Put over a model what stages before the one of a checkpoint have trained; a first stage has nothing such.

    Raises:
        ValueError: a tensor that the model has not.
    """
    if not (folder / EARLIER_FILE).is_file():
        return
    tensors = load_file(folder / EARLIER_FILE)
    if unknown := sorted(set(tensors) - set(model.state_dict())):
        raise ValueError(
            f"checkpoint {str(folder)!r} has {len(unknown)} tensors that the model has not, first {unknown[0]!r}; "
            "compose the model with the settings of that run"
        )
    model.load_state_dict(tensors, strict=False)


def all_trained(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that its run, or stages before it, have trained, by name."""
    earlier = load_file(folder / EARLIER_FILE) if (folder / EARLIER_FILE).is_file() else {}
    return {**earlier, **load_file(folder / TRAINED_FILE)}


# --- folders -----------------------------------------------------------------------------------------------------


def save(model: VLM, processor: Processor, folder: str | Path) -> None:
    """Model and processor as one transformers folder (safetensors and JSON); weights in four bits become bfloat16.

    Raises:
        ValueError: the model's layers were rounded to int8, which no folder of transformers can hold.
    """
    if any(parameter.dtype == torch.int8 for parameter in model.parameters()):
        raise ValueError(
            "a model in int8 is for answering and cannot be saved; load it with dtype=float32 and save that"
        )
    model.save_pretrained(folder, state_dict=unpacked_state_dict(model) if is_nf4(model) else None)
    processor.save_pretrained(folder)
    open_as_its_folder(Path(folder))


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
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
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
