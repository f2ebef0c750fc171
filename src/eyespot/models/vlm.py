"""The vision-language model: vision encoder, connector, language model, and one merge.

Shape letters: B rows, T tokens, N images, P patches, K image tokens per image, E vision width, D language width,
V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import ModelOutput

from eyespot.models.alignment import build_alignment
from eyespot.models.attention import attention_argument, check_takes_masks, kernels, tokens_ahead
from eyespot.models.detection import Detection
from eyespot.models.lora import add_lora, is_adapter, merge_adapter_folder, merge_lora
from eyespot.models.loss import causal_loss, head_logits
from eyespot.models.merge import merge, padding_to_the_left, placeholder_mask, positions_from_mask
from eyespot.models.vision.positions import with_positions
from eyespot.models.vision.pretrained import vision_from_config
from eyespot.registry import CONNECTORS, LANGUAGES, VISION

PARTS = ("vision", "connector", "language", "alignment", "detection")
TrainMode = Literal["frozen", "full", "lora"]
IMAGE_ATTENTION = ("causal", "bidirectional")


class VLMConfig(PreTrainedConfig):
    """What a VLM is made of.

    Args:
        vision_config: configuration of any vision model of transformers (ours too).
        text_config: configuration of any causal language model of transformers (ours too).
        connector: ``{"name": registered name, **arguments}``.
        image_token_id: placeholder id. An id beyond the language model's vocabulary is allowed: it is never looked up,
            and its logit is minus infinity.
        vision_layer: index into the encoder's hidden states; None takes its last hidden state.
        keep_cls: keep the tokens that stand before the patches (CLS, registers).
        vision_positions: frequencies of the sines and cosines of its place that each patch's features are given for the
            connector, 0 for none (see ``with_positions``).
        num_prefix_tokens: how many such tokens the encoder gives (computed when the model is composed).
        num_image_tokens: K, tokens per image after the connector (computed when the model is composed).
        image_scale: factor on the connector's output, so that images arrive at the size of the text embeddings.
        image_attention: "causal", or "bidirectional": the tokens of one picture see each other, as in Gemma 3 (arXiv
            2503.19786) and PaliGemma (arXiv 2407.07726); words see only what stands before them either way.
        lora: per part ("vision", "language") the settings of its adapter.
        alignment: the head that compares pictures with texts, for retrieval: ``{"dim": width of the shared space}``,
            and with a connector that has a text side ``decode_id``, the token that starts a caption there; None leaves
            the head out.
        detection: whether there is a head that finds objects on the image tokens.
        float32_parts: parts kept in float32 when the model as a whole is bfloat16.
    """

    model_type = "eyespot_vlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    auto_map: ClassVar[dict[str, str]] = {}  # no code beside the weights; TRL asks

    vision_config: Any = None
    text_config: Any = None
    connector: dict[str, Any] | None = None
    image_token_id: int = 0
    vision_layer: int | None = None
    keep_cls: bool = False
    vision_positions: int = 0
    num_prefix_tokens: int = 0
    num_image_tokens: int = 0
    image_scale: float = 1.0
    image_attention: str = "causal"
    lora: dict[str, Any] | None = None
    alignment: dict[str, Any] | None = None
    detection: bool = False
    float32_parts: list[str] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _as_config(self.vision_config or {"model_type": "eyespot_vit"})
        self.text_config = _as_config(self.text_config or {"model_type": "eyespot_gpt"})
        self.connector = dict(self.connector or {"name": "linear"})
        if self.image_attention not in IMAGE_ATTENTION:
            raise ValueError(f"image_attention is {self.image_attention!r}; choose {' or '.join(IMAGE_ATTENTION)}")
        # transformers resets the attention kernel of sub-configurations; ready parts keep theirs
        ready = {name: kernels(getattr(self, name)) for name in self.sub_configs}
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if kwargs.get("attn_implementation") is None:
            self._attn_implementation = ready


def _as_config(config: Any) -> Any:
    if isinstance(config, dict):
        VISION.load_all()
        LANGUAGES.load_all()
        values = dict(config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return config


@dataclass
class VLMOutput(ModelOutput):
    """loss float32 scalar; logits float [B, T, V]; past_key_values: the cache; last_hidden_state float [B, T, D], what
    the head reads; image_embeds float [N, K, D]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    last_hidden_state: Tensor | None = None
    image_embeds: Tensor | None = None


class VLM(PreTrainedModel, GenerationMixin):
    """A vision-language model as an ordinary model of transformers.

    ``vision``, ``connector`` and ``language`` may be handed in ready; left out, they are built from the configuration
    (that is how ``from_pretrained`` does it). Two heads that stages train, ``alignment`` and ``detection``, are None
    unless the configuration asks for them.
    """

    config_class = VLMConfig
    config: VLMConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(
        self, config: VLMConfig, vision: PreTrainedModel | None = None, language: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        self.vision = vision if vision is not None else vision_from_config(config.vision_config)
        self.connector = build_connector(config.connector, self.vision_dim, self.language_dim)
        self.language = language if language is not None else AutoModelForCausalLM.from_config(config.text_config)
        if config.image_attention == "bidirectional":
            check_takes_masks(
                self.language.config.get_text_config(), "image_attention=bidirectional needs", "image_attention=causal"
            )
        for part, settings in (config.lora or {}).items():
            add_lora(getattr(self, part), settings)
        self.alignment = build_alignment(config.alignment, self.connector, self.language_dim)
        self.detection = Detection(self.language_dim) if config.detection else None
        # transformers loads everything in one dtype but for the modules named here
        self._keep_in_fp32_modules_strict = (
            {rf"^{part}\." for part in config.float32_parts or []}
            | ({r"\.lora_[AB]\."} if config.lora else set())
            | ({r"^alignment\."} if config.alignment else set())
            | ({r"^detection\."} if config.detection else set())
        )
        self.language_inputs = set(inspect.signature(self.language.base_model.forward).parameters)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def vision_dim(self) -> int:
        """Width of what the connector reads."""
        return int(self.config.vision_config.hidden_size) + 4 * self.config.vision_positions

    @property
    def language_dim(self) -> int:
        return int(self.config.text_config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """What the model as a whole is saved and loaded in; ``float32_parts`` are the exceptions."""
        return self.compute_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products should run in: bfloat16 as soon as a part is kept in it."""
        is_bfloat16 = any(p.dtype == torch.bfloat16 for p in self.parameters())
        return torch.bfloat16 if is_bfloat16 else torch.float32

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.language.get_output_embeddings()
        return head

    def get_decoder(self) -> nn.Module:
        return self.language.base_model

    def _init_weights(self, module: nn.Module) -> None:
        """Every part initialises itself when it is built; from_pretrained is strict, so nothing is left to do."""

    # --- the picture -------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float [N, 3, H, W] -> patch features float [N, P, E]; no graph is kept of a frozen encoder."""
        layer = self.config.vision_layer
        needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(needs_grad):
            outputs = self.vision(pixel_values.to(self.vision.dtype), output_hidden_states=layer is not None)
        features: Tensor = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
        return features if self.config.keep_cls else features[:, self.config.num_prefix_tokens :]

    def embed_images(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """Pixels float [N, 3, H, W], or features float [N, P, E] encoded before -> image embeddings float [N, K, D]."""
        if image_features is None:
            assert pixel_values is not None
            image_features = self.encode_images(pixel_values)  # [N, P, E]
        embeds: Tensor = self.connector(self.connector_inputs(image_features))  # [N, K, D]
        return embeds * self.config.image_scale

    def connector_inputs(self, image_features: Tensor) -> Tensor:
        """Features float [N, P, E] -> in the connector's dtype, with the patches' places if it is told them."""
        dtype = next(self.connector.parameters()).dtype
        return with_positions(image_features.to(dtype), self.config.vision_positions)

    # --- the text ----------------------------------------------------------------------------------------------

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [B, T] -> text embeddings float [B, T, D]; placeholders are looked up as id 0."""
        ids = input_ids.masked_fill(placeholder_mask(input_ids, self.config.image_token_id), 0)
        embeds: Tensor = self.get_input_embeddings()(ids)
        return embeds

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Text with the pictures merged in: int64 [B, T], float [N, K, D] or None -> float [B, T, D]."""
        mask = placeholder_mask(input_ids, self.config.image_token_id)
        embeds = self.embed_text(input_ids)
        if image_embeds is None:
            image_embeds = embeds.new_zeros(0, max(1, self.config.num_image_tokens), embeds.shape[-1])
        return merge(embeds, image_embeds, mask)

    def tokens_ahead(self, input_ids: Tensor | None, mm_token_type_ids: Tensor | None) -> Tensor | None:
        """How far each token looks ahead, int64 [B, T]; None when every token looks back only.

        Raises:
            ValueError: a picture is cut, or nothing tells where the pictures are.
        """
        if self.config.image_attention == "causal":
            return None
        if input_ids is not None:
            is_image = placeholder_mask(input_ids, self.config.image_token_id)
        elif mm_token_type_ids is not None:
            is_image = mm_token_type_ids == 1
        else:
            raise ValueError(
                "inputs_embeds do not tell where pictures are, which image_attention=bidirectional needs to know; give "
                "mm_token_type_ids too, 1 on image tokens and 0 on words"
            )
        return tokens_ahead(is_image, self.config.num_image_tokens) if bool(is_image.any()) else None

    def image_mask(self, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any, ahead: Tensor) -> Any:
        """The mask for rows of one text each in which some tokens look ahead, as the language model takes it.

        Args:
            attention_mask: int64 [B, cached + T], 0 on padding. position_ids: int64 [B, T]; without a mask and a cache
                they may start again in a row, where another text begins (as in transformers).
            cache: of the tokens before, or None. ahead: int64 [B, T].
        """
        if attention_mask is None and cache is None and position_ids is not None:
            starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1]) != 1
            documents, positions = starts.cumsum(-1).expand_as(ahead), position_ids.expand_as(ahead)
        else:
            num_cached = 0 if cache is None else int(cache.get_seq_length())
            real = ahead.new_ones(len(ahead), num_cached + ahead.shape[1]) if attention_mask is None else attention_mask
            documents, positions = real.ne(0).long() - 1, positions_from_mask(real)
        return attention_argument(
            self.language.config.get_text_config(),
            documents,
            torch.zeros_like(documents),
            positions,
            self.language.dtype,
            ahead.shape[1],
            ahead,
            cache,
        )

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden float [..., D] -> logits float [..., V], one more column when the placeholder is beyond V."""
        logits = head_logits(self.language, hidden)
        if (missing := self.config.image_token_id + 1 - logits.shape[-1]) > 0:
            logits = F.pad(logits, (0, missing), value=float("-inf"))
        return logits

    # --- transformers ------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        documents: Tensor | None = None,
        branches: Tensor | None = None,
        previous: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> VLMOutput:
        """One pass.

        Args:
            input_ids: int64 [B, T], each image as K placeholder ids.
            pixel_values: float [N, 3, H, W], all pictures of the batch in the order of their placeholders.
            attention_mask: int64 [B, T], or a ready mask [B, 1, T, T] for rows with structure.
            position_ids: int64 [B, T]; computed from the mask when left out.
            inputs_embeds: float [B, T, D] instead of input_ids and pictures. mm_token_type_ids: int64 [B, T], 1 on
                their image tokens, needed only with ``config.image_attention`` "bidirectional".
            image_features: float [N, P, E], instead of pixel_values, when the pictures are encoded already.
            labels: int64 [B, T], -100 where nothing is to be learned; not shifted.
            num_items_in_batch: divisor of the summed loss (see ``causal_loss``).
            documents, branches, previous: int64 [B, T], the structure of packed rows, with position_ids
                (see ``eyespot.models.attention.structure_mask`` and ``eyespot.models.loss.supervised_hidden``); with
                a cache, of all columns from the first one on.
            logits_to_keep: logits for the last n positions only, or for the positions of an int64 tensor; 0 is all.
            skip_logits: leave the logits out; by default when labels are given.

        Raises:
            ValueError: placeholders and pictures do not fit each other.
        """
        image_embeds = None
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds; neither was given")
            if pixel_values is not None or image_features is not None:
                image_embeds = self.embed_images(pixel_values, image_features)
            inputs_embeds = self.embed(input_ids, image_embeds)
        length, dtype = inputs_embeds.shape[1], inputs_embeds.dtype
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions_from_mask(attention_mask)[:, -length:]
        ahead = self.tokens_ahead(input_ids, mm_token_type_ids)
        if documents is not None:
            assert branches is not None and position_ids is not None
            config = self.language.config.get_text_config()
            attention_mask = attention_argument(config, documents, branches, position_ids, dtype, length, ahead)
            position_ids = position_ids[:, -length:]
        elif ahead is not None and (attention_mask is None or getattr(attention_mask, "ndim", None) == 2):
            attention_mask = self.image_mask(attention_mask, position_ids, past_key_values, ahead)
        if "position_ids" in self.language_inputs:
            kwargs["position_ids"] = position_ids
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.language.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # [B, T, D]
        loss = logits = None
        if labels is not None:
            loss = causal_loss(self.language, hidden, labels, num_items_in_batch, previous)
        if not (labels is not None if skip_logits is None else skip_logits):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.compute_logits(hidden[:, keep])
        return VLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=getattr(outputs, "past_key_values", None),
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
            last_hidden_state=hidden,
            image_embeds=image_embeds,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,  # transformers looks for the name
        mm_token_type_ids: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, which hands the merged prompt on as embeddings; beside them, where the pictures are.

        It goes through as token_type_ids, which every version cuts to the part of the prompt that is not cached yet.
        """
        if is_first_iteration and self.config.image_attention == "bidirectional":
            told = input_ids.shape[1] > 0
            kinds = placeholder_mask(input_ids, self.config.image_token_id).long() if told else mm_token_type_ids
            kwargs["token_type_ids"] = kinds
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs: dict[str, Any] = prepare(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        return {"mm_token_type_ids": inputs.pop("token_type_ids", None), **inputs}

    def create_masks_for_generate(self, token_type_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """For a cache of fixed size transformers asks for the mask before it calls ``forward``."""
        ahead = None if token_type_ids is None else self.tokens_ahead(None, token_type_ids)
        if ahead is None:
            return create_masks_for_generate(**kwargs)
        return self.image_mask(kwargs["attention_mask"], kwargs["position_ids"], kwargs["past_key_values"], ahead)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate; the pictures are encoded and merged once, before beams or samples multiply the rows.

        Args:
            inputs: prompt ids int64 [B, T] (or ``input_ids=``); padding on the right is moved to the left.
            pixel_values: float [N, 3, H, W]. image_features: float [N, P, E], instead.

        Returns:
            What transformers' generate returns: prompt ids and new ids, int64 [B, T + new].
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return super().generate(input_ids, **kwargs)  # type: ignore[misc]
        if (mask := kwargs.get("attention_mask")) is not None and kwargs.get("position_ids") is None:
            input_ids, kwargs["attention_mask"] = padding_to_the_left(input_ids, mask)
        image_embeds = None
        if pixel_values is not None or image_features is not None:
            image_embeds = self.embed_images(pixel_values, image_features)
        inputs_embeds = self.embed(input_ids, image_embeds)
        return super().generate(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]

    def prefill(self, input_ids: Tensor, image_features: Tensor) -> DynamicCache:
        """The cache after the beginning of a prompt, for ``generate(whole prompt, past_key_values=copy of it, ...)``.

        input_ids int64 [1, T]; image_features float [N, P, E].
        """
        cache = DynamicCache(config=self.language.config)
        self(input_ids, image_features=image_features, past_key_values=cache, use_cache=True, skip_logits=True)
        return cache

    # --- training ----------------------------------------------------------------------------------------------

    def set_trainable(self, **modes: TrainMode) -> None:
        """Per part ``frozen``, ``full`` or ``lora``: ``model.set_trainable(vision="frozen", language="lora")``.

        ``full`` means the weights themselves; an adapter beside them is left as it is. The text side of a connector
        learns only while the alignment head does, because no other loss reaches it.

        Raises:
            ValueError: unknown part or mode; ``lora`` for a part that has no adapter; a head that the model has not.
        """
        for part, mode in modes.items():
            if part not in PARTS or mode not in ("frozen", "full", "lora"):
                raise ValueError(f"{part}={mode!r} is not a part and a mode; parts: {PARTS}, modes: frozen, full, lora")
            if getattr(self, part) is None:
                if mode == "frozen":
                    continue
                cure = "model.alignment={dim: 256}" if part == "alignment" else f"model.{part}=true"
                raise ValueError(f"the model has no {part} head; compose it with {cure}")
            if mode == "lora" and part not in (self.config.lora or {}):
                raise ValueError(f"{part} has no adapter; compose the model with {part}.lora set, or train it in full")
            bias = (self.config.lora or {}).get(part, {}).get("bias", "none")
            for name, parameter in getattr(self, part).named_parameters():
                is_full = mode == "full" and "lora_" not in name
                parameter.requires_grad_(is_adapter(name, bias) if mode == "lora" else is_full)
        for parameter in getattr(self.vision, "fixed_parameters", list)():
            parameter.requires_grad_(False)
        if not any(p.requires_grad for p in self.part_parameters("alignment")):
            for parameter in getattr(self.connector, "text_side", list)():
                parameter.requires_grad_(False)

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """Of one of PARTS; none of a part that the model has not."""
        module = getattr(self, part)
        return [] if module is None else list(module.parameters())

    def merge_adapters(self) -> None:
        """Add all adapters to the weights they adapt, for good, so that other trainers can put their own there."""
        merge_lora(self)
        self.config.lora = None

    def add_adapter_folder(self, folder: str | Path) -> None:
        """Add an adapter that peft saved for this model to the weights it adapts (see ``merge_adapters``).

        Raises:
            ValueError: the folder holds no such adapter, or one of another model.
        """
        self.merge_adapters()
        merge_adapter_folder(self, folder)

    def train(self, mode: bool = True) -> VLM:
        """Training mode for the parts that learn; a part without a trainable parameter stays in evaluation mode."""
        super().train(mode)
        for part in PARTS:
            module = getattr(self, part)
            if module is not None and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    @torch.no_grad()
    def image_text_ratio(self, pixel_values: Tensor, input_ids: Tensor) -> float:
        """Root mean square of the image embeddings over that of the text embeddings.

        pixel_values float [N, 3, H, W]; input_ids int64 of any shape, without padding.
        """
        text = self.embed_text(input_ids[~placeholder_mask(input_ids, self.config.image_token_id)])
        image = self.embed_images(pixel_values)
        return float(image.float().pow(2).mean().sqrt() / text.float().pow(2).mean().sqrt())

    def calibrate(self, pixel_values: Tensor, input_ids: Tensor) -> float:
        """Set ``config.image_scale`` so that images arrive at the size of the text; returns the ratio found before."""
        ratio = self.image_text_ratio(pixel_values, input_ids)
        self.config.image_scale /= ratio
        return ratio


def build_connector(settings: dict[str, Any] | None, vision_dim: int, language_dim: int) -> nn.Module:
    """The connector of ``{"name": ..., **arguments}`` between two widths."""
    arguments = dict(settings or {"name": "linear"})
    connector: nn.Module = CONNECTORS[arguments.pop("name")](
        vision_dim=vision_dim, language_dim=language_dim, **arguments
    )
    return connector


AutoConfig.register("eyespot_vlm", VLMConfig)
AutoModelForImageTextToText.register(VLMConfig, VLM)
AutoModelForCausalLM.register(VLMConfig, VLM)  # what TRL takes when it is given a folder
