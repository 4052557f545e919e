"""What an image tokenizer is: the configurations that stand in `config.json`.

The configuration wraps the configuration of a pretrained vision model and answers for it. `hidden_size`,
`image_size` and `patch_size` are what a multimodal host asks its vision tower for, so they are read from the encoder
and never stored twice.
"""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from unimm.errors import UserError
from unimm.field_rules import check_settings

GROUPS = 32  # of every group norm in a convolutional pixel head
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def side(value: int | list[int] | tuple[int, ...]) -> int:
    """One number for a square size that some configurations write as a pair."""
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise UserError(f"Only square images and patches are supported, not {tuple(value)}.")
    return value[0]


@strict
class ImageTokenizerConfig(PreTrainedConfig):
    """What every tokenizer has: an encoder, its feature tap, a codebook, an output patch and the normalization.

    Args:
        encoder_config: the vision model's own configuration.
        feature_layer: which of the encoder's `hidden_states` are the features (-1 = the last block's output).
        apply_post_norm: whether the encoder's final norm is applied to them; only at the last layer.
        codebook_size, codebook_dim: K and C.
        output_patch_size: pixels a side that one token draws; None = the encoder's patch size.
        image_mean, image_std: normalization of `pixel_values` and, inverted, of `pixels`.
    """

    model_type = "image_tokenizer"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model")}

    encoder_config: dict | PreTrainedConfig | None = None
    feature_layer: int = -1
    apply_post_norm: bool = False
    codebook_size: int = 16384
    codebook_dim: int = 1536
    output_patch_size: int | None = None
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        check_settings(vars(self) | kwargs, type(self).__name__)
        super().__post_init__(**kwargs)
        if self.image_size % self.patch_size:
            raise UserError(f"An image of {self.image_size} pixels is no multiple of the patch size {self.patch_size}.")
        layers = self.num_hidden_layers
        if not -layers - 1 <= self.feature_layer <= layers:
            raise UserError(
                f"feature_layer is {self.feature_layer}: an encoder of {layers} layers has {-layers - 1} to {layers}."
            )
        if min(self.codebook_size, self.codebook_dim) < 1:
            raise UserError(f"A codebook of {self.codebook_size} x {self.codebook_dim} is empty.")

    @property
    def vision(self) -> PreTrainedConfig:
        """`encoder_config`, as the configuration that it is once this one is built."""
        assert isinstance(self.encoder_config, PreTrainedConfig)
        return self.encoder_config

    def encoder_copy(self) -> PreTrainedConfig:
        """A copy of `encoder_config` for one module: two modules that share a configuration drift."""
        return type(self.vision).from_dict(self.vision.to_dict())

    @property
    def hidden_size(self) -> int:
        """D, the width of the features."""
        return self.vision.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.vision.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.vision.num_attention_heads

    @property
    def image_size(self) -> int:
        """Pixels a side of the images that the encoder reads."""
        return side(self.vision.image_size)

    @property
    def patch_size(self) -> int:
        return side(self.vision.patch_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches of one image, (rows, columns): what a host sees."""
        rows = self.image_size // self.patch_size
        return rows, rows

    @property
    def num_patches(self) -> int:
        """N."""
        rows, columns = self.patch_grid
        return rows * columns

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens of one image, (rows, columns), in raster order: what is drawn."""
        return self.patch_grid

    @property
    def num_image_tokens(self) -> int:
        """M."""
        rows, columns = self.grid
        return rows * columns

    @property
    def decoded_patch_size(self) -> int:
        return self.output_patch_size or self.patch_size

    @property
    def output_size(self) -> int:
        """Pixels a side of the images that it draws."""
        return self.patch_grid[0] * self.decoded_patch_size

    @property
    def geometry(self) -> tuple[object, ...]:
        """What decides the ids beside the weights: part of the fingerprint."""
        return self.model_type, self.image_size, self.patch_size, self.feature_layer, self.apply_post_norm

    def check_levels(self, levels: Sequence[int]) -> None:
        """Raises UserError for encoder levels (1 = the first block's output) that are not there, or not rising."""
        last = range(self.num_hidden_layers + 1)[self.feature_layer]
        if not levels or list(levels) != sorted(set(levels)) or levels[0] < 1 or levels[-1] > last:
            raise UserError(
                f"Levels {list(levels)} of an encoder with {self.num_hidden_layers} layers, features from layer "
                f"{last}: they must rise and lie in 1 to {last}."
            )

    def check_head(self, channels: int, multipliers: Sequence[int], patch: int) -> None:
        """Raises UserError where a convolutional head does not fit its group norms, or the `patch` pixels a side that
        one token draws."""
        if channels % GROUPS or channels < GROUPS:
            raise UserError(f"The head's channels come in groups of {GROUPS}, and {channels} is no multiple of it.")
        if (drawn := 2 ** (len(multipliers) - 1)) != patch:
            raise UserError(
                f"A head of {len(multipliers)} levels draws {drawn} x {drawn} pixels a token and {patch} x {patch} are "
                "asked for: change head_multipliers or output_patch_size."
            )


@strict
class VQRAEConfig(ImageTokenizerConfig):
    """VQRAE (arXiv 2511.23386); the defaults are the paper's, and where it is silent those of SimVQ (arXiv 2411.02038).

    Args:
        decoder_num_hidden_layers: None = as deep as the encoder ("symmetric").
        codebook_bias: a bias in SimVQ's W.
        train_codebook: also learn C; SimVQ keeps it as drawn.
        pre_quant_norm: a LayerNorm before the in-projection.
    """

    model_type = "vqrae"

    decoder_num_hidden_layers: int | None = None
    codebook_bias: bool = False
    train_codebook: bool = False
    pre_quant_norm: bool = False


@strict
class VFMTokConfig(ImageTokenizerConfig):
    """VFMTok (arXiv 2507.08441); the defaults are the paper's, and where it is silent those of the released code.

    Args:
        levels: the encoder blocks (1 = the first) whose outputs are sampled; the last one, behind the final norm where
            `apply_post_norm`, is what the feature branch predicts.
        anchor_grid: anchors a side; the ids are theirs.
        width, num_heads: of sampler and decoder.
        sampler_num_layers, sampler_points, sampler_inner_size: layers; points a head and level; MLP width.
        decoder_num_layers, decoder_inner_size, decoder_dropout: layers; MLP width before SwiGLU takes two thirds of it;
            dropout of the attention.
        num_registers: of the decoder.
        share_mask_token: one mask token for pixels and features (paper) or one each (released code).
        head_channels, head_multipliers: of the convolutional head; a pixel token draws 2^(levels - 1) pixels a side.
    """

    model_type = "vfmtok"
    sub_configs_defaults = {
        "encoder_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="dinov2_with_registers",
            init_kwargs={**_LARGE, "image_size": 336, "patch_size": 14, "mlp_ratio": 4},
        )
    }

    codebook_dim: int = 12
    apply_post_norm: bool = True
    levels: list[int] | tuple[int, ...] = (6, 12, 18, 24)
    anchor_grid: int = 16
    width: int = 512
    num_heads: int = 8
    sampler_num_layers: int = 6
    sampler_points: int = 4
    sampler_inner_size: int = 1024
    decoder_num_layers: int = 6
    decoder_inner_size: int = 2048
    decoder_dropout: float = 0.1
    num_registers: int = 4
    share_mask_token: bool = True
    head_channels: int = 128
    head_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check_levels(self.levels)
        self.check_head(self.head_channels, self.head_multipliers, self.decoded_patch_size)
        check_heads(self.width, self.num_heads)
        if self.anchor_grid < 1 or self.image_size % self.decoded_patch_size:
            raise UserError(
                f"An image of {self.image_size} pixels does not fit {self.anchor_grid} x {self.anchor_grid} anchors "
                f"and pixel tokens of {self.decoded_patch_size} pixels."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """The anchors, (rows, columns), in raster order: each is one id, whatever the patches are."""
        return self.anchor_grid, self.anchor_grid

    @property
    def decoded_patch_size(self) -> int:
        """Pixels a side that one pixel token draws: pixel tokens are neither patches nor ids."""
        return self.output_patch_size or 2 ** (len(self.head_multipliers) - 1)

    @property
    def pixel_grid(self) -> tuple[int, int]:
        """Pixel tokens of one image, (rows, columns)."""
        rows = self.image_size // self.decoded_patch_size
        return rows, rows

    @property
    def output_size(self) -> int:
        return self.image_size

    @property
    def geometry(self) -> tuple[object, ...]:
        return *super().geometry, tuple(self.levels), self.anchor_grid, self.num_heads


@strict
class IDEALConfig(ImageTokenizerConfig):
    """IDEAL, a discrete autoencoder whose codes explain a deep and a shallow level; the defaults are the released
    code's.

    Args:
        shallow_level, deep_level: the encoder blocks (1 = the first) that are fused; the deep one lies behind the final
            norm where `apply_post_norm`, the shallow one behind a norm without weights.
        num_heads, dropout: of fusion and decoder.
        fusion_inner_size: MLP width; None = twice the encoder's.
        decoder_num_layers, decoder_inner_size, num_registers: of the decoder; None = twice the encoder's width.
        head_channels, head_multipliers: of the convolutional head; a token draws 2^(levels - 1) pixels a side.
    """

    model_type = "ideal"
    sub_configs_defaults = {
        "encoder_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="siglip_vision_model",
            init_kwargs={**_LARGE, "image_size": 384, "patch_size": 16, "intermediate_size": 4096},
        )
    }

    codebook_dim: int = 64
    apply_post_norm: bool = True
    shallow_level: int = 8
    deep_level: int = 24
    num_heads: int = 8
    dropout: float = 0.1
    fusion_inner_size: int | None = None
    decoder_num_layers: int = 6
    decoder_inner_size: int | None = None
    num_registers: int = 4
    head_channels: int = 128
    head_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check_levels((self.shallow_level, self.deep_level))
        self.check_head(self.head_channels, self.head_multipliers, self.decoded_patch_size)
        check_heads(self.hidden_size, self.num_heads)

    @property
    def geometry(self) -> tuple[object, ...]:
        return *super().geometry, self.shallow_level, self.deep_level, self.num_heads


def check_heads(width: int, heads: int) -> None:
    """Raises UserError where the heads do not share the width evenly."""
    if width % heads:
        raise UserError(f"A width of {width} cannot be shared by {heads} heads.")
