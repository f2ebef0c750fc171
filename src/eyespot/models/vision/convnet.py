"""A small residual network with group normalisation: pictures in, one embedding per cell of the last grid out.

Source: He et al., arXiv 1512.03385 (residual blocks), Wu and He, arXiv 1803.08494 (group normalisation),
He et al., arXiv 1502.01852 (initial weights).
"""

from __future__ import annotations

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
from transformers.utils.generic import can_return_tuple

from eyespot.models.vision.vit import check_pixels


class EyespotConvNetConfig(PreTrainedConfig):
    """Sizes of an `EyespotConvNetModel`: one stage for each entry of `hidden_sizes` and `depths`.

    Each stage after the first halves the grid. `stem_stride` is how much the stem shrinks the picture: 4 as in the
    paper (a convolution, then pooling), 2 (the convolution alone) or 1 (a small convolution, for tiny pictures).
    `groups` 32 is the choice of arXiv 1803.08494, table 3.

    Raises:
        ValueError: lists of unequal length, a width that `groups` does not divide, an unknown `stem_stride`.
    """

    model_type = "eyespot_convnet"

    image_size: int = 224
    num_channels: int = 3
    hidden_sizes: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    depths: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    stem_stride: int = 4
    groups: int = 32
    group_norm_eps: float = 1e-5
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if not self.hidden_sizes or len(self.hidden_sizes) != len(self.depths) or min(self.depths) < 1:
            raise ValueError(
                f"hidden_sizes {self.hidden_sizes} and depths {self.depths} must have one entry, 1 or more, for each "
                f"stage; make the two lists equally long"
            )
        odd = [width for width in self.hidden_sizes if width < 1 or width % self.groups]
        if odd:
            raise ValueError(f"groups {self.groups} does not divide the widths {odd}; choose a divisor of all widths")
        if self.stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride is {self.stem_stride}; choose 1, 2 or 4")
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; give at least 1")

    @property
    def hidden_size(self) -> int:
        """E, the width of the last stage."""
        return self.hidden_sizes[-1]

    @property
    def num_tokens(self) -> int:
        """P, the cells of the last grid; each halving rounds up."""
        stride = self.stem_stride << (len(self.depths) - 1)
        return (-(-self.image_size // stride)) ** 2


class ConvStem(nn.Module):
    """First convolution. Source: arXiv 1512.03385, table 1 (7x7, stride 2, then 3x3 pooling, stride 2)."""

    def __init__(self, config: EyespotConvNetConfig) -> None:
        super().__init__()
        kernel, stride = (3, 1) if config.stem_stride == 1 else (7, 2)
        width = config.hidden_sizes[0]
        self.conv = nn.Conv2d(config.num_channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(config.groups, width, eps=config.group_norm_eps)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if config.stem_stride == 4 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.pool(F.relu(self.norm(self.conv(x))))
        return output


class ResidualBlock(GradientCheckpointingLayer):
    """Two 3x3 convolutions beside a shortcut. Source: arXiv 1512.03385, figure 2 and shortcut option B."""

    def __init__(self, in_width: int, width: int, stride: int, groups: int, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width, eps=eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width, eps=eps)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, width, 1, stride=stride, bias=False), nn.GroupNorm(groups, width, eps=eps)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def conv_stage(config: EyespotConvNetConfig, index: int) -> nn.Sequential:
    """The blocks of one stage; the first block changes the width and, except in stage 0, halves the grid."""
    width, in_width = config.hidden_sizes[index], config.hidden_sizes[max(index - 1, 0)]
    blocks = [ResidualBlock(in_width, width, 1 if index == 0 else 2, config.groups, config.group_norm_eps)]
    blocks += [
        ResidualBlock(width, width, 1, config.groups, config.group_norm_eps) for _ in range(config.depths[index] - 1)
    ]
    return nn.Sequential(*blocks)


def grid_to_tokens(x: Tensor) -> Tensor:
    """Float [N, E, H, W] to [N, H * W, E], row by row."""
    return x.flatten(2).transpose(1, 2)


class EyespotConvNetModel(PreTrainedModel):
    """Residual network without a classifier. A picture's features never depend on the other pictures of the batch."""

    config_class = EyespotConvNetConfig
    config: EyespotConvNetConfig
    base_model_prefix = "convnet"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConvStem", "ResidualBlock"]

    def __init__(self, config: EyespotConvNetConfig) -> None:
        super().__init__(config)
        self.stem = ConvStem(config)
        self.stages = nn.ModuleList(conv_stage(config, index) for index in range(len(config.depths)))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.stem.conv

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Encode pictures.

        Args:
            pixel_values: float [N, C, H, W], normalised with `config.image_mean` and `config.image_std`.
            output_hidden_states: also return the stem's and each stage's grid.

        Returns:
            `last_hidden_state` float [N, P, E], the last grid row by row, and, if asked for, `hidden_states`: float
            [N, P_i, E_i] for the stem and each stage.

        Raises:
            ValueError: pictures of another size than `config.image_size`.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        grids = [self.stem(pixel_values.to(self.dtype))]  # [N, E_0, H_0, W_0]
        for stage in self.stages:
            grids.append(stage(grids[-1]))
        return BaseModelOutput(
            last_hidden_state=grid_to_tokens(grids[-1]),
            hidden_states=tuple(map(grid_to_tokens, grids)) if output_hidden_states else None,
        )


def build_convnet(
    *,
    image_size: int = 224,
    num_channels: int = 3,
    hidden_sizes: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    stem_stride: int = 4,
    groups: int = 32,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
) -> EyespotConvNetModel:
    """A residual network with random weights; the names are those of `EyespotConvNetConfig`.

    Raises:
        ValueError: sizes that do not fit together.
    """
    config = EyespotConvNetConfig(
        image_size=image_size,
        num_channels=num_channels,
        hidden_sizes=list(hidden_sizes),
        depths=list(depths),
        stem_stride=stem_stride,
        groups=groups,
        image_mean=list(image_mean),
        image_std=list(image_std),
    )
    return EyespotConvNetModel(config)


AutoConfig.register("eyespot_convnet", EyespotConvNetConfig)
AutoModel.register(EyespotConvNetConfig, EyespotConvNetModel)
