"""Two vision encoders as one: the features of the same patch side by side, along the width.

A language-supervised encoder (CLIP, SigLIP) knows what things are called, a self-supervised one (DINOv2) where their
edges are. Source: Karamcheti et al., arXiv 2402.07865 (Prismatic: two encoders, patches joined along the width); Tong
et al., arXiv 2406.16860 (Cambrian-1: features are resampled to one grid before they are joined).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils.generic import can_return_tuple

from eyespot.models.attention import kernels
from eyespot.models.vision.pretrained import image_size_of, token_counts, vision_from_config
from eyespot.models.vision.vit import check_pixels
from eyespot.registry import VISION

_HALF = (0.5, 0.5, 0.5)


class EyespotFusionConfig(PreTrainedConfig):
    """What an `EyespotFusionModel` is made of.

    `first_config` and `second_config` are the encoders' own. Pixels come in with the first encoder's size, `image_mean`
    and `image_std`; `second_size`, `second_mean` and `second_std` are what the second one wants. `prefix_tokens`: how
    many tokens (CLS, registers) each puts before its patches. `resample_patches`: the second grid may be another one.
    """

    model_type = "eyespot_fusion"
    sub_configs = {"first_config": AutoConfig, "second_config": AutoConfig}

    first_config: Any = None
    second_config: Any = None
    image_mean: list[float] = field(default_factory=lambda: [*_HALF])
    image_std: list[float] = field(default_factory=lambda: [*_HALF])
    second_mean: list[float] = field(default_factory=lambda: [*_HALF])
    second_std: list[float] = field(default_factory=lambda: [*_HALF])
    second_size: int | None = None
    prefix_tokens: list[int] = field(default_factory=lambda: [0, 0])
    resample_patches: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.first_config, self.second_config = map(_as_config, (self.first_config, self.second_config))
        if self.second_size is None:
            self.second_size = image_size_of(self.second_config)
        # transformers resets the attention kernel of sub-configurations; ready parts keep theirs
        own = {name: kernels(getattr(self, name)) for name in self.sub_configs}
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if kwargs.get("attn_implementation") is None:
            self._attn_implementation = own

    @property
    def hidden_size(self) -> int:
        """E, both widths together."""
        return int(self.first_config.hidden_size + self.second_config.hidden_size)

    @property
    def image_size(self) -> int:
        """Side of the picture that comes in, in pixels: the first encoder's."""
        return image_size_of(self.first_config)


def _as_config(config: Any) -> Any:
    if isinstance(config, PreTrainedConfig):
        return config
    VISION.load_all()
    values = dict(config or {"model_type": "eyespot_vit"})
    return AutoConfig.for_model(values.pop("model_type"), **values)


class EyespotFusionModel(PreTrainedModel):
    """Two encoders, handed in ready or built from the configuration. Letters: P patches, E_1 and E_2 their widths."""

    config_class = EyespotFusionConfig
    config: EyespotFusionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: EyespotFusionConfig,
        first: PreTrainedModel | None = None,
        second: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.first = first if first is not None else vision_from_config(config.first_config)
        self.second = second if second is not None else vision_from_config(config.second_config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.first.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Each encoder initialises itself when it is built."""

    def pixels_for_second(self, pixel_values: Tensor) -> Tensor:
        """The picture as the second encoder wants it.

        Args:
            pixel_values: float [N, 3, H, W], normalised for the first encoder.

        Returns:
            float [N, 3, S, S] of the same dtype: brought back to [0, 1], resized (bilinear, with antialiasing where it
            shrinks) if S is another size, and normalised with the second encoder's mean and deviation.
        """
        config, size = self.config, self.config.second_size
        assert size is not None
        mean, std, second_mean, second_std = (
            torch.tensor(values, dtype=torch.float32, device=pixel_values.device).view(-1, 1, 1)
            for values in (config.image_mean, config.image_std, config.second_mean, config.second_std)
        )
        picture = pixel_values.float() * std + mean
        if picture.shape[-1] != size:
            picture = F.interpolate(picture, size=(size, size), mode="bilinear", antialias=True)
        return ((picture - second_mean) / second_std).to(pixel_values.dtype)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Tokens of both encoders to joined patches.

        first float [N, prefix + P, E_1], second float [N, prefix + P, E_2] -> float [N, P, E_1 + E_2]; each encoder's
        prefix tokens are dropped, because they stand for no patch.

        Raises:
            ValueError: the grids differ, and `resample_patches` is off.
        """
        first, second = self._patches(first, second)
        if first.shape[1] != second.shape[1]:
            if not self.config.resample_patches:
                raise ValueError(self._unequal(first.shape[1], second.shape[1]))
            second = resample_grid(second, first.shape[1])
        return torch.cat([first, second], dim=-1)

    def _patches(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        before_first, before_second = self.config.prefix_tokens
        return first[:, before_first:], second[:, before_second:]

    def _unequal(self, first: int, second: int) -> str:
        config = self.config
        (a, b), (p, q) = map(math.isqrt, (first, second)), (config.image_size, config.second_size)
        return (
            f"the first encoder ({config.first_config.model_type}) makes {a}x{a} patches of {p} pixels, the second "
            f"({config.second_config.model_type}) {b}x{b} of {q}; make them equal with second_size or other encoders, "
            "or set resample_patches=true"
        )

    def _joined_states(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Hidden states paired from the last layer backwards, as far as their patches pair."""

        def pair(states: tuple[Tensor, Tensor]) -> bool:
            a, b = self._patches(*states)
            return a.shape[1] == b.shape[1] or self.config.resample_patches

        pairs = itertools.takewhile(pair, zip(reversed(first), reversed(second), strict=False))
        return tuple(self.join(*states) for states in pairs)[::-1]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Encode pictures.

        Args:
            pixel_values: float [N, 3, H, W], normalised with `config.image_mean` and `config.image_std`.
            output_hidden_states: also return the joined hidden states of both.

        Returns:
            `last_hidden_state` float [N, P, E_1 + E_2] and, if asked for, `hidden_states` of the same shape. They count
            from the end: index -2 joins the states before the last layer of either, whatever their depths are, and
            the tuple is as long as the shorter encoder's (shorter, where early grids are unequal).

        Raises:
            ValueError: pictures of another size than `config.image_size`, or unequal grids.
        """
        check_pixels(pixel_values, getattr(self.config.first_config, "num_channels", 3), self.config.image_size)
        inputs = (self.first, pixel_values), (self.second, self.pixels_for_second(pixel_values))
        first, second = (
            encoder(pixels.to(encoder.dtype), output_hidden_states=output_hidden_states) for encoder, pixels in inputs
        )
        return BaseModelOutput(
            last_hidden_state=self.join(first.last_hidden_state, second.last_hidden_state),
            hidden_states=(
                self._joined_states(first.hidden_states, second.hidden_states) if output_hidden_states else None
            ),
        )


def resample_grid(features: Tensor, num_patches: int) -> Tensor:
    """A square grid of patch features on another square grid, bilinear, with antialiasing where it shrinks.

    features float [N, P, E] -> float [N, num_patches, E] of the same dtype.
    """
    old, new = math.isqrt(features.shape[1]), math.isqrt(num_patches)
    grid = features.float().transpose(1, 2).unflatten(2, (old, old))  # [N, E, old, old]
    resampled = F.interpolate(grid, size=(new, new), mode="bilinear", antialias=True)
    return resampled.flatten(2).transpose(1, 2).to(features.dtype)


def build_fusion(
    *,
    first: dict[str, Any],
    second: dict[str, Any],
    second_size: int | None = None,
    resample_patches: bool = False,
) -> EyespotFusionModel:
    """Two registered encoders as one.

    Pictures are cut and scaled as the first one wants it, so an encoder that reads several sizes (DINOv2) is better the
    second. The tokens that either puts before its patches (CLS, registers) are dropped.

    Args:
        first, second: ``{"name": registered name, **arguments}`` of each, for example
            ``{"name": "pretrained", "source": "facebook/dinov2-large"}``.
        second_size: side of the picture that the second encoder reads, in pixels, for encoders that read several
            sizes (DINOv2); by default that of its configuration.
        resample_patches: bring the second encoder's features to the first one's grid (bilinear) if it has another.

    Raises:
        ValueError: the grids differ and may not be resampled, or an encoder's mean and deviation are not known.
    """
    encoders = [_load(first), _load(second)]
    configs = [encoder.config for encoder in encoders]
    mean, std = _normalisation(configs[0], first)
    second_mean, second_std = _normalisation(configs[1], second)
    config = EyespotFusionConfig(
        first_config=configs[0],
        second_config=configs[1],
        image_mean=mean,
        image_std=std,
        second_mean=second_mean,
        second_std=second_std,
        second_size=second_size,
        prefix_tokens=[token_counts(configs[0])[0], token_counts(_resized(configs[1], second_size))[0]],
        resample_patches=resample_patches,
    )
    try:
        token_counts(config)  # one pass without data: what does not fit together is refused here
    except RuntimeError as error:
        raise ValueError(
            f"the second encoder ({configs[1].model_type}) does not read pictures of {config.second_size} pixels; its "
            f"own size is {image_size_of(configs[1])}, leave out second_size"
        ) from error
    return EyespotFusionModel(config, *encoders)


def _load(part: dict[str, Any]) -> PreTrainedModel:
    arguments = dict(part)
    encoder: PreTrainedModel = VISION[arguments.pop("name")](**arguments)
    return encoder


def _resized(config: PreTrainedConfig, size: int | None) -> PreTrainedConfig:
    if size is None:
        return config
    resized = copy.deepcopy(config)
    resized.image_size = size
    return resized


def _normalisation(config: PreTrainedConfig, part: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of an encoder's pixels: our configurations name them, others' image processors do."""
    named = (
        config
        if hasattr(config, "image_mean")
        else AutoImageProcessor.from_pretrained(part["source"], trust_remote_code=False)
    )
    if not getattr(named, "do_normalize", True) or named.image_mean is None or named.image_std is None:
        raise ValueError(
            f"the image processor of {part['source']!r} does not normalise, so the pixels that it wants are not known; "
            "set do_normalize, image_mean and image_std in its preprocessor_config.json"
        )
    return [float(value) for value in named.image_mean], [float(value) for value in named.image_std]


AutoConfig.register("eyespot_fusion", EyespotFusionConfig)
AutoModel.register(EyespotFusionConfig, EyespotFusionModel)
