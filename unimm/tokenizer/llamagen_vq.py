"""LlamaGen's VQ: a convolutional image tokenizer trained on pixels alone (arXiv 2406.06525, section 2.1).

Its encoder is a stack of residual convolutions that halves the image four times (VQ-16) or three times (VQ-8); such a
stack in reverse decodes the codes. The features are the encoder's output, one for each patch.
"""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from unimm.errors import UserError
from unimm.tokenizer.configuration import ImageTokenizerConfig
from unimm.tokenizer.layers import OwnStart, start_torch
from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.pixel_heads import Float32GroupNorm, ResidualConv, SpatialAttention, Upsample
from unimm.tokenizer.quantizers import NormalizedVQ
from unimm.tokenizer.registry import register_tokenizer
from unimm.tokenizer.samplers import GridSampler


@strict
class ConvEncoderConfig(PreTrainedConfig):
    """Configuration of LlamaGen's convolutional encoder. Defaults: VQ-16 at 256 pixels, any multiple of 16 fits.

    Args:
        hidden_size: D, the channels of the output.
        head_channels, head_multipliers: base number of channels, and its multiples from full resolution down.
        num_blocks: residual blocks a level; the decoder has one more.
    """

    model_type = "llamagen_encoder"

    image_size: int = 256
    hidden_size: int = 256
    head_channels: int = 128
    head_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    num_hidden_layers: int = 1
    num_attention_heads: int = 1

    @property
    def patch_size(self) -> int:
        """Return the side in pixels of the image part that one code stands for."""
        return int(2 ** (len(self.head_multipliers) - 1))


@strict
class LlamaGenVQConfig(ImageTokenizerConfig):
    """Configuration of LlamaGen's VQ; `encoder_config` is a `ConvEncoderConfig`."""

    model_type = "llamagen_vq"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="llamagen_encoder")}

    codebook_dim: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not isinstance(self.vision, ConvEncoderConfig):
            raise UserError(f"LlamaGen's VQ has its own encoder and takes no pretrained {self.vision.model_type}.")
        self.check_head(self.vision.head_channels, self.vision.head_multipliers, self.decoded_patch_size)


class Downsample(Upsample):
    """A 3x3 convolution with stride 2, padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ConvLevel(nn.Module):
    """Residual blocks at one resolution, each followed by attention if `attends`, then up- or downsampling."""

    def __init__(self, before: int, after: int, blocks: int, attends: bool, resample: type[nn.Module] | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualConv(before if k == 0 else after, after) for k in range(blocks))
        self.attention = nn.ModuleList(SpatialAttention(after) for _ in range(blocks if attends else 0))
        self.resample = nn.Identity() if resample is None else resample(after)

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x)
            x = self.attention[k](x) if len(self.attention) else x
        return self.resample(x)


class ConvStack(OwnStart):
    """LlamaGen's encoder or decoder, with attention in its middle part and at the lowest resolution.

    `sizes` are the channels of the levels in order, of `blocks` residual blocks each. With `Downsample` the middle part
    and the lowest resolution come last, with `Upsample` first.
    """

    def __init__(self, before: int, after: int, sizes: Sequence[int], blocks: int, resample: type[nn.Module]) -> None:
        super().__init__()
        self.ascends, last = resample is Upsample, len(sizes) - 1
        self.inlet = nn.Conv2d(before, sizes[0], 3, padding=1)
        lowest, widths = 0 if self.ascends else last, [sizes[0], *sizes]
        ends = [*[resample] * last, None]
        levels = (ConvLevel(widths[k], sizes[k], blocks, k == lowest, ends[k]) for k in range(last + 1))
        self.levels = nn.Sequential(*levels)
        deep = sizes[lowest]
        self.middle = nn.Sequential(ResidualConv(deep, deep), SpatialAttention(deep), ResidualConv(deep, deep))
        self.norm, self.outlet = Float32GroupNorm(sizes[-1]), nn.Conv2d(sizes[-1], after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        x = self.levels(self.middle(x)) if self.ascends else self.middle(self.levels(x))
        return self.outlet(F.silu(self.norm(x)))

    def start(self) -> None:
        start_torch(self)


class LlamaGenVQ(ImageTokenizer):
    """LlamaGen's VQ: image -> convolutions -> VQ -> convolutions."""

    config_class = LlamaGenVQConfig

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__(config)
        vision = config.vision
        sizes = [vision.head_channels * multiple for multiple in vision.head_multipliers]
        self.encoder = ConvStack(3, vision.hidden_size, sizes, vision.num_blocks, Downsample)
        self.sampler = GridSampler(vision.hidden_size, config.codebook_dim)
        self.quantizer = NormalizedVQ(config.codebook_size, config.codebook_dim)
        self.decoder = nn.Linear(config.codebook_dim, vision.hidden_size)
        self.pixel_head = ConvStack(vision.hidden_size, 3, sizes[::-1], vision.num_blocks + 1, Upsample)
        self.post_init()

    def hidden_states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the encoder's output [B, N, D], its only hidden state."""
        self.patch_grid_of(pixel_values)
        return (self.encoder(pixel_values.to(self.dtype)).flatten(2).transpose(1, 2).contiguous(),)

    def draw(self, codes: Tensor, grid: tuple[int, int], *, predict: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode codes [B, M, C] into unclamped pixels [B, 3, H, W]; no features are predicted."""
        maps = self.decoder(codes.to(self.decoder.weight.dtype)).transpose(1, 2).unflatten(2, grid)
        return self.denormalize(self.pixel_head(maps).float()), {}


AutoConfig.register(ConvEncoderConfig.model_type, ConvEncoderConfig, exist_ok=True)
register_tokenizer(LlamaGenVQ)
