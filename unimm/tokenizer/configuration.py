"""What an image tokenizer is: the configurations that stand in `config.json`.

Special here: the configuration wraps the configuration of a pretrained vision model and answers for it. `hidden_size`,
`image_size` and `patch_size` are what a multimodal host asks its vision tower for, so they are read from the encoder
and never stored twice.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from unimm.errors import UserError


def side(value: int | list[int] | tuple[int, ...]) -> int:
    """One number for a square size that some configurations write as a pair."""
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise UserError(f"Only square pictures and patches are supported, not {tuple(value)}.")
    return value[0]


@strict
class ImageTokenizerConfig(PreTrainedConfig):
    """What every tokenizer has: an encoder, its feature tap, a codebook, an output patch and the normalisation.

    Args:
        encoder_config: the vision model's own configuration.
        feature_layer: which of the encoder's `hidden_states` are the features (-1 = the last block's output).
        apply_post_norm: whether the encoder's final norm is applied to them; only at the last layer.
        codebook_size, codebook_dim: K and C.
        output_patch_size: pixels a side that one token draws; None = the encoder's patch size.
        image_mean, image_std: normalisation of `pixel_values` and, inverted, of `pixels`.
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
        super().__post_init__(**kwargs)
        if self.image_size % self.patch_size:
            raise UserError(f"An image of {self.image_size} pixels is no multiple of the patch size {self.patch_size}.")
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
        """Pixels a side of the pictures that the encoder reads."""
        return side(self.vision.image_size)

    @property
    def patch_size(self) -> int:
        return side(self.vision.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens of one picture, (rows, columns)."""
        rows = self.image_size // self.patch_size
        return rows, rows

    @property
    def num_image_tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def decoded_patch_size(self) -> int:
        return self.output_patch_size or self.patch_size


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
