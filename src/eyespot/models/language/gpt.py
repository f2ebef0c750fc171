"""A causal language model written from scratch, of GPT-2's design.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners",
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf (model and
initial weights), Vaswani et al., arXiv 1706.03762 (attention), Hendrycks and Gimpel, arXiv 1606.08415 (GELU and its
tanh form), Press and Wolf, arXiv 1608.05859 (one matrix for embedding and head).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs


class EyespotGPTConfig(PreTrainedConfig):
    """Sizes of an `EyespotGPTForCausalLM`. `intermediate_size` None means four times `hidden_size`.

    Raises:
        ValueError: a size below one, heads that do not divide the width, or a token id outside the vocabulary.
    """

    model_type = "eyespot_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    max_position_embeddings: int = 512
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        for name in ("vocab_size", "max_position_embeddings", "hidden_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )
        self._check_token_ids()

    def _check_token_ids(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name} {token_id} is outside the vocabulary of {self.vocab_size}; give the tokenizer's id or "
                        f"a larger vocab_size"
                    )


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for `attn_implementation="eager"`. Source: arXiv 1706.03762, equation 1.

    Args:
        module: the layer that asks; its mode decides about dropout.
        query: float [B, heads, T, D / heads].
        key: float [B, heads, past + T, D / heads].
        value: float [B, heads, past + T, D / heads].
        attention_mask: float [B, 1, T, past + T], added to the scores; None where every key may be seen.
        scaling: factor on the scores.
        dropout: share of the weights set to zero in training.
        **kwargs: what other attention functions take; nothing here.

    Returns:
        Mixed values float [B, T, heads, D / heads] and weights float [B, heads, T, past + T].
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class ResidualLinear(nn.Linear):
    """The layer that ends a residual branch; a class of its own, because it starts with smaller weights."""


class GPTAttention(nn.Module):
    """Every token looks at itself and at what came before. Source: arXiv 1706.03762, section 3.2."""

    def __init__(self, config: EyespotGPTConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = ResidualLinear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)  # [B, T, D] -> [B, heads, T, D / heads]

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.dropout if self.training else 0.0
        scaling = 1 / math.sqrt(self.head_dim)
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return self.o_proj(mixed.flatten(2)), weights


class GPTMLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them, as GPT-2. Source: arXiv 1606.08415, section 2."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner_width)
        self.down_proj = ResidualLinear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return output


class GPTLayer(GradientCheckpointingLayer):
    """Attention and MLP, each normalised before and added after. Source: the GPT-2 report, section 2.3."""

    def __init__(self, config: EyespotGPTConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GPTAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GPTMLP(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Tensor:
        mixed, _ = self.attention(self.attention_norm(x), attention_mask, past_key_values, **kwargs)
        x = x + self.dropout(mixed)
        output: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return output


def positions(attention_mask: Tensor | None, num_past: int, length: int, device: torch.device) -> Tensor:
    """Positions int64 [B, T] or [1, T] that count real tokens only, so that padding on either side changes nothing.

    Args:
        attention_mask: [B, past + T], nonzero where a token is real; anything else than two dimensions tells nothing
            about padding, and positions then count from the cache on.
        num_past: tokens in the cache.
        length: T.
        device: where the positions are needed.

    Raises:
        ValueError: the mask does not cover cache and input.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(num_past, num_past + length, device=device)[None]
    if attention_mask.shape[1] != num_past + length:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns but {num_past} cached and {length} new tokens need "
            f"{num_past + length}; give the mask of the whole sequence"
        )
    counted = (attention_mask != 0).long().cumsum(dim=-1) - 1
    return counted.clamp(min=0)[:, -length:].to(device)


def check_positions(position_ids: Tensor, num_tokens: int, limit: int) -> None:
    """Refuse positions beyond the learned ones.

    A sequence no longer than the limit needs no look at the positions, which on a GPU would wait for the device.

    Raises:
        ValueError: a position of `limit` or more.
    """
    if num_tokens > limit and int(position_ids.max()) >= limit:
        raise ValueError(
            f"the sequence reaches position {int(position_ids.max()) + 1} but the model has max_position_embeddings "
            f"{limit}; shorten the input or build the model with more positions"
        )


class EyespotGPTPreTrainedModel(PreTrainedModel):
    """What the model and its head share: the configuration, the initial weights, what transformers may do with it."""

    config_class = EyespotGPTConfig
    config: EyespotGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["GPTLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": GPTLayer, "attentions": GPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, ResidualLinear):
            # By the root of the number of branches, two in each layer (GPT-2 report, section 2.3).
            init.normal_(
                module.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            )


class EyespotGPTModel(EyespotGPTPreTrainedModel):
    """Token and position embeddings, layers, last norm.

    Parameters, with V words, M positions, D wide, I inside the MLP and L layers:
    `V*D + M*D + L*(4*D*D + 2*D*I + I + 9*D) + 2*D`; a tied head adds none. The default size has 124,046,592.
    """

    def __init__(self, config: EyespotGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(GPTLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch.

        Args:
            input_ids: int64 [B, T]; exactly one of this and `inputs_embeds`.
            attention_mask: [B, past + T], nonzero where a token is real, or a finished mask [B, 1, T, past + T], bool
                (True may be seen) or float (added to the scores), which is used as it is.
            position_ids: int64 [B, T]; None counts the real tokens of a two-dimensional mask. Without a mask and a
                cache, positions that start again separate the packed texts of a row.
            past_key_values: the cache of earlier tokens; it grows by T.
            inputs_embeds: float [B, T, D].
            use_cache: return a cache; None means `config.use_cache`, but not in training.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and what the attention function takes.

        Returns:
            `last_hidden_state` float [B, T, D], `past_key_values`, and, if asked for, `hidden_states`: the embeddings
            and the output of each layer, the last one after the last norm.

        Raises:
            ValueError: both or neither of ids and embeddings, a mask of the wrong width, or too long a sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given or both missing; give exactly one of them")
        embeds: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        length = embeds.shape[1]
        mask = create_causal_mask(self.config, embeds, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            position_ids = positions(attention_mask, num_past, length, embeds.device)
        check_positions(position_ids, num_past + length, self.config.max_position_embeddings)
        x = self.dropout(embeds + self.embed_positions(position_ids))
        for layer in self.layers:
            x = layer(x, mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(self.norm(x), past_key_values if use_cache else None)


class EyespotGPTForCausalLM(EyespotGPTPreTrainedModel, GenerationMixin):
    """`EyespotGPTModel` with a head that gives each word of the vocabulary a score."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EyespotGPTConfig) -> None:
        super().__init__(config)
        self.model = EyespotGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the next token. See `EyespotGPTModel.forward` for the other arguments.

        Args:
            labels: int64 [B, T], the ids themselves (the shift is done here), -100 where nothing is to be learned.
            logits_to_keep: the last positions to score (0 is all), or int64 [K] indices of the positions.
            **kwargs: also `num_items_in_batch`, the divisor of a summed loss.

        Returns:
            `logits` float [B, T, V] or [B, K, V], `loss` float [] if there are labels, `past_key_values`,
            `hidden_states`, `attentions`.

        Raises:
            ValueError: labels together with `logits_to_keep`, and all that `EyespotGPTModel.forward` raises.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of every position; leave out logits_to_keep")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def build_gpt(
    *,
    vocab_size: int = 50257,
    max_position_embeddings: int = 512,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    intermediate_size: int | None = None,
    layer_norm_eps: float = 1e-5,
    dropout: float = 0.0,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> EyespotGPTForCausalLM:
    """A causal language model with random weights; the names are those of `EyespotGPTConfig`.

    initializer_range suits a width of 768; a narrow model learns sooner with about 1 / sqrt(hidden_size).

    Raises:
        ValueError: sizes that do not fit together.
    """
    config = EyespotGPTConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        layer_norm_eps=layer_norm_eps,
        dropout=dropout,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    return EyespotGPTForCausalLM(config)


AutoConfig.register("eyespot_gpt", EyespotGPTConfig)
AutoModel.register(EyespotGPTConfig, EyespotGPTModel)
AutoModelForCausalLM.register(EyespotGPTConfig, EyespotGPTForCausalLM)
