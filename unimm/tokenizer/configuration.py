"""The configurations of the image tokenizers: `VQRAEConfig`, `VFMTokConfig`, `IDEALConfig` and their base.

A configuration wraps that of a pretrained vision model. `hidden_size`, `image_size` and `patch_size`, which a host (the
multimodal model that the tokenizer is attached to) looks up on its vision tower's configuration, are properties that
read the encoder's configuration, so they are never stored twice.
"""

from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from unimm.errors import UserError
from unimm.field_rules import check_settings

GROUPS = 32  # groups of a GroupNorm in a convolutional pixel head, but for VQRAE's head_groups
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def side(value: int | list[int] | tuple[int, ...]) -> int:
    """Return a square size as one number; some configurations store it as a pair."""
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise UserError(f"Only square images and patches are supported, not {tuple(value)}.")
    return value[0]


@strict
class ImageTokenizerConfig(PreTrainedConfig):
    """Base configuration: encoder, feature layer, codebook size, output patch size and normalization.

    Args:
        encoder_config: the vision model's configuration.
        feature_layer: which of the encoder's `hidden_states` are the features (-1 = the last block's output).
        feature_layers: with k > 1 the features are the sum of the k layers up to `feature_layer` (RAEv2); VQRAE only.
        apply_post_norm: whether the encoder's final norm is applied to them; only at the last layer.
        codebook_size, codebook_dim: K and C.
        output_patch_size: side in pixels of the patch that one token decodes to; None = the encoder's patch size.
        image_mean, image_std: normalization of `pixel_values` and, inverted, of `pixels`.
    """

    model_type = "image_tokenizer"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model")}

    encoder_config: dict | PreTrainedConfig | None = None
    feature_layer: int = -1
    feature_layers: int = 1
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
        if not 1 <= self.feature_layers <= (last := range(layers + 1)[self.feature_layer]) + 1:
            raise UserError(f"feature_layers is {self.feature_layers}: up to layer {last} there are {last + 1}.")
        if min(self.codebook_size, self.codebook_dim) < 1:
            raise UserError(f"A codebook of {self.codebook_size} x {self.codebook_dim} is empty.")

    @property
    def vision(self) -> PreTrainedConfig:
        """Return `encoder_config`, narrowed to the configuration object that it is after `__post_init__`."""
        assert isinstance(self.encoder_config, PreTrainedConfig)
        return self.encoder_config

    def encoder_copy(self) -> PreTrainedConfig:
        """Copy `encoder_config` for one module, so that no module sees another's changes to a shared configuration."""
        return type(self.vision).from_dict(self.vision.to_dict())

    @property
    def hidden_size(self) -> int:
        """Return D, the width of the features."""
        return self.vision.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.vision.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.vision.num_attention_heads

    @property
    def image_size(self) -> int:
        """Return the side in pixels of the encoder's input images."""
        return side(self.vision.image_size)

    @property
    def patch_size(self) -> int:
        return side(self.vision.patch_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Return the (rows, columns) of the patches of one image, which a host receives as features."""
        rows = self.image_size // self.patch_size
        return rows, rows

    @property
    def num_patches(self) -> int:
        """Return N, the number of patches of one image."""
        rows, columns = self.patch_grid
        return rows * columns

    @property
    def grid(self) -> tuple[int, int]:
        """Return the (rows, columns) of the image tokens (ids) of one image, in raster order."""
        return self.patch_grid

    @property
    def num_image_tokens(self) -> int:
        """Return M, the number of image tokens of one image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def decoded_patch_size(self) -> int:
        return self.output_patch_size or self.patch_size

    @property
    def output_size(self) -> int:
        """Return the side in pixels of the decoded images."""
        return self.patch_grid[0] * self.decoded_patch_size

    @property
    def geometry(self) -> tuple[object, ...]:
        """Return the settings that decide the ids besides the weights; they enter the fingerprint."""
        found = self.model_type, self.image_size, self.patch_size, self.feature_layer, self.apply_post_norm
        return found if self.feature_layers == 1 else (*found, "sum", self.feature_layers)

    def check_levels(self, levels: Sequence[int], *, repeated: bool = False) -> None:
        """Raise UserError if encoder levels (1 = the first block's output) do not exist or do not increase; with
        `repeated`, neighbors may be equal."""
        last = range(self.num_hidden_layers + 1)[self.feature_layer]
        if (summed := self.feature_layers) != 1:
            raise UserError(f"feature_layers is {summed}, and this tokenizer reads single levels: leave it out.")
        if (
            not levels
            or list(levels) != sorted(levels if repeated else set(levels))
            or levels[0] < 1
            or levels[-1] > last
        ):
            raise UserError(
                f"Levels {list(levels)} of an encoder with {self.num_hidden_layers} layers, features from layer "
                f"{last}: they must rise and lie in 1 to {last}."
            )

    def check_head(self, channels: int, multipliers: Sequence[int], patch: int, groups: int = GROUPS) -> None:
        """Raise UserError if a convolutional head's channels do not divide into groups, or its upsampling does not
        produce `patch` pixels a side per token."""
        if channels % groups or channels < groups:
            raise UserError(f"The head's channels come in {groups} groups, and {channels} is no multiple of it.")
        if (drawn := 2 ** (len(multipliers) - 1)) != patch:
            raise UserError(
                f"A head of {len(multipliers)} levels draws {drawn} x {drawn} pixels a token and {patch} x {patch} are "
                "asked for: change head_multipliers or output_patch_size."
            )


@strict
class VQRAEConfig(ImageTokenizerConfig):
    """Configuration of VQRAE (arXiv 2511.23386). Defaults are the paper's, else those of SimVQ (arXiv 2411.02038).

    Args:
        decoder_num_hidden_layers: None = as deep as the encoder ("symmetric").
        quantizer: "simvq", the paper's; "vq" (VQ-VAE's), "averaged" (the same by moving averages) and "normalized"
            (LlamaGen's) are for comparison.
        codebook_bias: a bias in SimVQ's W.
        train_codebook: also learn C; SimVQ freezes it at its random initialization.
        pre_quant_norm: a LayerNorm before the in-projection.
        pixel_head: "patch", the paper's linear layer for each patch, or "conv" (ours), a convolutional head whose edges
            cross patches; `head_channels` and `head_multipliers` are its own, as in `IDEALConfig`. Its group norms have
            `head_groups` groups: with as many as channels they are instance norms, which leave bright specks.
    """

    model_type = "vqrae"

    decoder_num_hidden_layers: int | None = None
    quantizer: Literal["simvq", "vq", "averaged", "normalized"] = "simvq"
    codebook_bias: bool = False
    train_codebook: bool = False
    pre_quant_norm: bool = False
    pixel_head: Literal["patch", "conv"] = "patch"
    head_channels: int = 32
    head_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2)
    head_groups: int = GROUPS

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.quantizer != "simvq" and (self.codebook_bias or self.train_codebook):
            raise UserError(f"codebook_bias and train_codebook belong to simvq, and the quantizer is {self.quantizer}.")
        if self.pixel_head == "conv":
            self.check_head(self.head_channels, self.head_multipliers, self.decoded_patch_size, self.head_groups)


@strict
class VFMTokConfig(ImageTokenizerConfig):
    """Configuration of VFMTok (arXiv 2507.08441). Defaults are the paper's, else those of the released code.

    Args:
        levels: the encoder blocks (1 = the first) whose outputs are sampled; the last one, after the final norm if
            `apply_post_norm`, is the target of the feature branch.
        anchor_grid: anchors a side; each anchor yields one id.
        width, num_heads: of sampler and decoder.
        sampler_num_layers, sampler_points, sampler_inner_size: layers; points per head and level; MLP width.
        decoder_num_layers, decoder_inner_size, decoder_dropout: layers; MLP width, of which SwiGLU uses two thirds;
            attention dropout.
        num_registers: register tokens of the decoder.
        share_mask_token: one mask token for pixels and features (paper) or one each (released code).
        head_channels, head_multipliers: of the convolutional head; with L multipliers a pixel token decodes to
            2^(L - 1) pixels a side.
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
        """Return the (rows, columns) of the anchors, one id each in raster order, independent of the patches."""
        return self.anchor_grid, self.anchor_grid

    @property
    def decoded_patch_size(self) -> int:
        """Return the side in pixels that one pixel token decodes to; pixel tokens are neither patches nor ids."""
        return self.output_patch_size or 2 ** (len(self.head_multipliers) - 1)

    @property
    def pixel_grid(self) -> tuple[int, int]:
        """Return the (rows, columns) of the pixel tokens of one image."""
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
    """Configuration of IDEAL (arXiv 2606.11096), an autoencoder of a deep and a shallow encoder level. Defaults are the
    released code's.

    Args:
        shallow_level, deep_level: the encoder blocks (1 = the first) that are fused; the deep one is taken after the
            final norm if `apply_post_norm`, the shallow one after a layer norm without weights. Two equal levels are
            IDEAL of one level, with the same weights and work.
        num_heads, dropout: of fusion and decoder.
        fusion_inner_size: MLP width; None = twice the encoder's.
        decoder_num_layers, decoder_inner_size, num_registers: of the decoder; None = twice the encoder's width.
        head_channels, head_multipliers: of the convolutional head; with L multipliers a token decodes to 2^(L - 1)
            pixels a side.
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
        self.check_levels((self.shallow_level, self.deep_level), repeated=True)
        self.check_head(self.head_channels, self.head_multipliers, self.decoded_patch_size)
        check_heads(self.hidden_size, self.num_heads)

    @property
    def geometry(self) -> tuple[object, ...]:
        return *super().geometry, self.shallow_level, self.deep_level, self.num_heads


def check_heads(width: int, heads: int) -> None:
    """Raise UserError if the width is no multiple of the number of heads."""
    if width % heads:
        raise UserError(f"A width of {width} cannot be shared by {heads} heads.")
