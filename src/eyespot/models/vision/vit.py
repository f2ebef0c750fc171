"""A vision transformer written from scratch: pictures in, one embedding per patch out.

Source: Dosovitskiy et al., arXiv 2010.11929 (model), Vaswani et al., arXiv 1706.03762 (attention),
Xiong et al., arXiv 2002.04745 (normalisation before each branch), Hendrycks and Gimpel, arXiv 1606.08415 (GELU),
Xiao et al., arXiv 2106.14881 (convolutional stem), He et al., arXiv 1502.01852 (its initial weights).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs


def check_pixels(pixel_values: Tensor, num_channels: int, image_size: int) -> None:
    """Refuse pictures of another shape than the encoder was built for, because its token count depends on it.

    Args:
        pixel_values: float [N, C, H, W].
        num_channels: the C the encoder was built for.
        image_size: the H and W, in pixels, the encoder was built for.

    Raises:
        ValueError: another number of dimensions, channels or pixels.
    """
    expected = (num_channels, image_size, image_size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values have shape {list(pixel_values.shape)} but the encoder takes [N, {num_channels}, "
            f"{image_size}, {image_size}]; resize the pictures to {image_size}x{image_size} or build the encoder "
            f"with their image_size"
        )


STEM_GROUPS = 8


class EyespotViTConfig(PreTrainedConfig):
    """Sizes of an `EyespotViTModel`.

    `intermediate_size` None means four times `hidden_size` (arXiv 1706.03762, section 3.3). `image_mean` and
    `image_std` tell the image processor how to normalise; 0.5 maps [0, 1] to [-1, 1]. `stem` "patch" makes each patch
    a token with one linear map, "conv" with a few small convolutions, which learn shapes from fewer pictures.
    `position_range` is the standard deviation of the initial position embeddings, `initializer_range` unless given.

    Raises:
        ValueError: a size below one, one that does not divide as it must, an unknown `stem`, or with the convolutional
            stem a `patch_size` that is no power of two or a `hidden_size` that cannot be halved as often.
    """

    model_type = "eyespot_vit"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    layer_norm_eps: float = 1e-6
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    position_range: float | None = None
    use_cls_token: bool = False
    stem: str = "patch"
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        for name in ("image_size", "patch_size", "num_channels", "hidden_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"choose {max(self.image_size // self.patch_size, 1) * self.patch_size} or another patch_size"
            )
        if self.stem not in ("patch", "conv"):
            raise ValueError(f"stem is {self.stem!r}; choose patch or conv")
        if self.stem == "conv":
            self._check_conv_stem()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )

    def _check_conv_stem(self) -> None:
        halvings = self.patch_size.bit_length() - 1
        narrowest = STEM_GROUPS << max(halvings - 1, 0)
        if self.patch_size != 1 << halvings or halvings < 1:
            raise ValueError(
                f"the conv stem halves the picture, patch_size {self.patch_size} is no power of two from 2 on"
            )
        if self.hidden_size % narrowest:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {narrowest}, which the conv stem with patch_size "
                f"{self.patch_size} needs; choose {max(self.hidden_size // narrowest, 1) * narrowest} or stem='patch'"
            )

    @property
    def num_tokens(self) -> int:
        """P, the tokens that one picture becomes, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + int(self.use_cls_token)


def conv_stem(num_channels: int, width: int, patch_size: int) -> nn.Sequential:
    """3x3 convolutions that each halve the picture and double the width up to ``width``, then a 1x1 one.

    Source: arXiv 2106.14881, section 4, with group in place of batch normalisation (arXiv 1803.08494): the features of
    a picture may not depend on the other pictures of the batch.
    """
    halvings = patch_size.bit_length() - 1
    widths = [num_channels, *(width >> i for i in reversed(range(halvings)))]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GroupNorm(STEM_GROUPS, after)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))


class ViTEmbeddings(nn.Module):
    """Patches to tokens: the stem, the class token if there is one, learned positions."""

    def __init__(self, config: EyespotViTConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding: nn.Module = (
            conv_stem(config.num_channels, width, patch)
            if config.stem == "conv"
            else nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_cls_token else None
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [N, P, E]
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        embedded: Tensor = self.dropout(tokens + self.position_embedding)
        return embedded


class ViTAttention(nn.Module):
    """Every token looks at every token. Source: arXiv 1706.03762, section 3.2."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Three layers instead of one wide layer, so that adapters can name them as in any transformers model.
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)  # [N, P, E] -> [N, heads, P, E / heads]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class ViTMLP(nn.Module):
    """Two linear layers with the exact GELU between them. Source: arXiv 2010.11929, section 3.1."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner_width)
        self.down_proj = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return output


class ViTLayer(GradientCheckpointingLayer):
    """Attention and MLP, each normalised before and added after. Source: arXiv 2010.11929, equations 2 and 3."""

    def __init__(self, config: EyespotViTConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTAttention(config.hidden_size, config.num_attention_heads)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTMLP(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        output: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return output


class EyespotViTModel(PreTrainedModel):
    """Vision transformer without a classifier.

    Parameters, with E wide, I inside the MLP, L layers, P tokens and C channels of p x p patches:
    `C*p*p*E + E` (patches) `+ P*E` (positions) `+ L*(4*E*E + 2*E*I + I + 9*E)` (layers) `+ 2*E` (last norm), and E
    more for a class token. The default size has 85,797,120.
    Attention is always `F.scaled_dot_product_attention`, whichever `attn_implementation` is named.
    """

    config_class = EyespotViTConfig
    config: EyespotViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ViTEmbeddings", "ViTLayer"]
    _can_record_outputs = {"hidden_states": ViTLayer}

    def __init__(self, config: EyespotViTConfig) -> None:
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, ViTEmbeddings):
            spread = self.config.position_range
            init.trunc_normal_(
                module.position_embedding, std=self.config.initializer_range if spread is None else spread
            )
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
        if isinstance(module, nn.Conv2d) and self.config.stem == "conv":
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    # Ties nothing: the last hidden state in the list is the one before the last norm, as in transformers' ViT.
    @capture_outputs(tie_last_hidden_states=False)  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode pictures.

        Args:
            pixel_values: float [N, C, H, W], normalised with `config.image_mean` and `config.image_std`.
            **kwargs: `output_hidden_states` (bool) and `return_dict` (bool) of transformers.

        Returns:
            `last_hidden_state` float [N, P, E], P counting the class token if there is one (it comes first), and, if
            asked for, `hidden_states`: the embeddings and the output of each layer, float [N, P, E] each.

        Raises:
            ValueError: pictures of another size than `config.image_size`.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.embeddings(pixel_values.to(self.dtype))  # [N, P, E]
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=self.norm(x))


def build_vit(
    *,
    image_size: int = 224,
    patch_size: int = 16,
    num_channels: int = 3,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    intermediate_size: int | None = None,
    layer_norm_eps: float = 1e-6,
    hidden_dropout: float = 0.0,
    use_cls_token: bool = False,
    stem: str = "patch",
    initializer_range: float = 0.02,
    position_range: float | None = None,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
) -> EyespotViTModel:
    """A vision transformer with random weights; the names are those of `EyespotViTConfig`.

    initializer_range suits a width of 768; a narrow model learns sooner with about 1 / sqrt(hidden_size).

    Raises:
        ValueError: sizes that do not fit together.
    """
    config = EyespotViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=num_channels,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        layer_norm_eps=layer_norm_eps,
        hidden_dropout=hidden_dropout,
        use_cls_token=use_cls_token,
        stem=stem,
        initializer_range=initializer_range,
        position_range=position_range,
        image_mean=list(image_mean),
        image_std=list(image_std),
    )
    return EyespotViTModel(config)


AutoConfig.register("eyespot_vit", EyespotViTConfig)
AutoModel.register(EyespotViTConfig, EyespotViTModel)
