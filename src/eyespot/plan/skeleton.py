"""The model of a run without its weights: every part on the meta device, and the processor if a tokenizer is here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eyespot.compose import build_processor, image_processor_for, load_tokenizer, picture_size
from eyespot.config import ConfigError, LanguageSettings, ModelSettings, VisionSettings, check_model, to_dict
from eyespot.models.language.gguf import GEMMA_PACKAGE, gguf_folder
from eyespot.models.published import published_config
from eyespot.models.vision.pretrained import image_size_of, token_counts, vision_from_config, without_late_layers
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.images import EyespotImageProcessor
from eyespot.processing.processor import Processor
from eyespot.processing.texts import TEXT_FOLDER, decode_id, with_ends
from eyespot.registry import LANGUAGES, VISION

# words of tokenizers on the Hub, for machines that do not have them (the vocab_size of their config.json)
VOCABULARIES = {"openai-community/gpt2": 50_257, "google-bert/bert-base-uncased": 30_522}
BERT_MASK = 103


@dataclass(frozen=True)
class Skeleton:
    """model: on the meta device, nothing of it set trainable. processor: None without the tokenizers. image_size: side
    of the pictures that the encoder is given, in pixels."""

    model: VLM
    processor: Processor | None
    image_size: int


def skeleton(settings: ModelSettings, fast_bfloat16: bool) -> Skeleton:
    """What ``build_from_settings`` composes, less the numbers in it.

    Args:
        settings: of the model; tokenizers that are learned from texts must have been (a folder in place of "bpe:SIZE").
        fast_bfloat16: whether matrix products in bfloat16 are quick where the model will be, which decides on the dtype
            of frozen weights.

    Raises:
        ConfigError: a setting is unknown or does not fit. ValueError: the configuration of a part cannot be read.
    """
    check_model(settings)
    settings = decided(settings, fast_bfloat16)
    vision = vision_skeleton(settings.vision)
    layer = without_late_layers(vision, settings.vision.layer)
    tokenizer, texts = tokenizer_of(settings.language), text_tokenizer(settings)
    language = language_skeleton(settings.language, tokenizer)
    image_processor = _image_processor(settings.vision, vision.config)
    size = picture_size(image_processor)
    prefix, patches = token_counts(vision.config, size)
    words = int(language.config.get_text_config().vocab_size)
    config = VLMConfig(
        vision_config=vision.config,
        text_config=language.config,
        connector={"name": settings.connector.name, **settings.connector.args, **_text_sizes(settings, texts)},
        image_token_id=max(words, 0 if tokenizer is None else len(tokenizer)),
        vision_layer=layer,
        keep_cls=settings.vision.keep_cls,
        vision_positions=settings.vision.positions,
        num_prefix_tokens=prefix,
        image_attention=settings.image_attention,
        lora={
            name: to_dict(part.lora)
            for name, part in (("vision", settings.vision), ("language", settings.language))
            if part.lora is not None
        },
        alignment=_alignment(settings, texts),
        detection=settings.detection,
        tie_word_embeddings=bool(getattr(language.config, "tie_word_embeddings", False)),
    )
    with torch.device("meta"):
        model = VLM(config, vision=vision, language=language)
    config.num_image_tokens = model.connector.num_tokens(patches + prefix * settings.vision.keep_cls)  # type: ignore[operator]
    if tokenizer is None or isinstance(texts, int):
        return Skeleton(model, None, size)
    processor = build_processor(model, tokenizer, image_processor, settings)
    if settings.alignment is not None:
        processor.max_text = settings.alignment.max_text
    if texts is not None:
        processor.text_tokenizer, processor.text_folder = texts, TEXT_FOLDER
    return Skeleton(model, processor, size)


def decided(settings: ModelSettings, fast_bfloat16: bool) -> ModelSettings:
    """Every dtype "auto" as ``eyespot.compose.with_dtypes`` decides it on such a device, which need not be this one."""

    def decide(part: Any) -> Any:
        half = fast_bfloat16 and part.train != "full"
        return replace(part, dtype="bfloat16" if half else "float32") if part.dtype == "auto" else part

    return replace(settings, vision=decide(settings.vision), language=decide(settings.language))


def vision_skeleton(settings: VisionSettings) -> PreTrainedModel:
    """A registered encoder on the meta device, in its dtype."""
    model: Any = _encoder({"name": settings.name, **settings.args})
    return model.to(_dtype(settings))  # type: ignore[no-any-return]


def _encoder(part: Mapping[str, Any]) -> PreTrainedModel:
    arguments = dict(part)
    name = arguments.pop("name")
    if name == "fusion":
        return _fusion(arguments)
    with torch.device("meta"):
        if name == "pretrained":
            return vision_from_config(published_config(arguments["source"]))
        factory = VISION[name]
        if "pretrained" in inspect.signature(factory).parameters:
            arguments["pretrained"] = False  # no weights are read; the sizes are the same
        return factory(**arguments)  # type: ignore[no-any-return]


def _fusion(arguments: Mapping[str, Any]) -> PreTrainedModel:
    """Two encoders as one; what pixels they want has no say in sizes."""
    from eyespot.models.vision.fusion import EyespotFusionConfig, EyespotFusionModel

    encoders = [_encoder(arguments["first"]), _encoder(arguments["second"])]
    first, second = (encoder.config for encoder in encoders)
    size = arguments.get("second_size")
    config = EyespotFusionConfig(
        first_config=first, second_config=second, second_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        second_mean=[0.5] * 3, second_std=[0.5] * 3, resample_patches=arguments.get("resample_patches", False),
        prefix_tokens=[token_counts(first)[0], token_counts(second, size)[0]],
    )  # fmt: skip
    with torch.device("meta"):
        return EyespotFusionModel(config, *encoders)


def language_skeleton(settings: LanguageSettings, tokenizer: Any) -> PreTrainedModel:
    """A registered language model on the meta device, in its dtype."""
    kernel: dict[str, Any] = {}
    if settings.name in ("pretrained", "gguf"):
        config = _language_config(settings)
        if implementation := settings.args.get("attn_implementation"):
            kernel = {"attn_implementation": implementation}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **kernel)
    else:
        if tokenizer is None and (words := VOCABULARIES.get(settings.tokenizer or "")) is None:
            raise ConfigError(
                f"model.language.tokenizer {settings.tokenizer!r} is not on this machine, so nobody knows how many "
                "words it has; load it once, or give its folder"
            )
        sizes = {"vocab_size": words if tokenizer is None else len(tokenizer), **settings.args}
        with torch.device("meta"):
            model = LANGUAGES[settings.name](**sizes)
    return model.to(_dtype(settings))  # type: ignore[no-any-return]


def _language_config(settings: LanguageSettings) -> Any:
    if settings.name == "pretrained":
        return published_config(settings.args["source"])
    if settings.args.get("source", GEMMA_PACKAGE) == GEMMA_PACKAGE:
        return published_config("google/gemma-3-270m")
    return AutoConfig.from_pretrained(gguf_folder(settings.args["source"], settings.args.get("cache_dir")))


def tokenizer_of(settings: LanguageSettings) -> Any:
    """The language model's tokenizer; None if it is on the Hub and not on this machine."""
    if settings.tokenizer or settings.name not in ("pretrained", "gguf"):
        return _tokenizer(settings.tokenizer or "byte")
    if settings.name == "gguf":
        source = settings.args.get("source", GEMMA_PACKAGE)
        return AutoTokenizer.from_pretrained(gguf_folder(source, settings.args.get("cache_dir")))
    return _tokenizer(settings.args["source"])


def _tokenizer(name: str) -> Any:
    try:
        return load_tokenizer(name)
    except OSError as error:
        if Path(name).exists():
            raise ConfigError(f"the folder {name!r} holds no readable tokenizer ({error})") from error
        return None


def text_tokenizer(settings: ModelSettings) -> Any:
    """Of the connector's text side: a tokenizer, its number of words where it is not on this machine, or None.

    Raises:
        ConfigError: it is not on this machine, and the number of its words is not known.
    """
    alignment = settings.alignment
    if alignment is None or alignment.tokenizer is None:
        return None
    if (found := _tokenizer(alignment.tokenizer)) is not None:
        return with_ends(found)
    if alignment.tokenizer not in VOCABULARIES:
        raise ConfigError(f"model.alignment.tokenizer {alignment.tokenizer!r} is not on this machine; load it once")
    return VOCABULARIES[alignment.tokenizer]


def _text_sizes(settings: ModelSettings, texts: Any) -> dict[str, int]:
    if texts is None or settings.alignment is None:
        return {}
    return {"text_vocab_size": texts if isinstance(texts, int) else len(texts), "max_text": settings.alignment.max_text}


def _alignment(settings: ModelSettings, texts: Any) -> dict[str, int] | None:
    if settings.alignment is None:
        return None
    head = {"dim": settings.alignment.dim}
    if texts is None:
        return head
    return {**head, "decode_id": BERT_MASK if isinstance(texts, int) else decode_id(texts)}


def _image_processor(settings: VisionSettings, vision_config: Any) -> Any:
    """The encoder's own; for one that is not on this machine, what makes pictures of its size."""
    try:
        return image_processor_for(settings, vision_config)
    except OSError:
        first = getattr(vision_config, "first_config", vision_config)
        return EyespotImageProcessor(size=image_size_of(first))


def _dtype(settings: VisionSettings | LanguageSettings) -> torch.dtype:
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
