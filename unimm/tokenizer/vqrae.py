"""VQRAE: a vector-quantized representation autoencoder (arXiv 2511.23386, figure 2).

One pretrained encoder has two outputs: continuous features for understanding, and ids of a high-dimensional SimVQ
codebook over the same features, which a ViT that mirrors the encoder decodes into pixels. The patch embedding is the
only convolution.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from unimm.errors import UserError
from unimm.tokenizer.configuration import VQRAEConfig
from unimm.tokenizer.decoders import SymmetricViTDecoder
from unimm.tokenizer.encoders import build_encoder
from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.pixel_heads import ConvHead, PatchHead
from unimm.tokenizer.quantizers import QUANTIZERS, Quantizer, SimVQ
from unimm.tokenizer.registry import register_tokenizer
from unimm.tokenizer.samplers import GridSampler

HEAD_FIELDS = {"pixel_head", "head_channels", "head_multipliers", "head_groups"}


class VQRAE(ImageTokenizer):
    """VQRAE: image -> encoder -> features -> in-projection -> SimVQ -> out-projection -> mirrored blocks -> patches."""

    config_class = VQRAEConfig

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config.encoder_copy(), config._attn_implementation)
        self.sampler = GridSampler(config.hidden_size, config.codebook_dim, config.pre_quant_norm)
        self.quantizer = quantizer(config)
        self.decoder = SymmetricViTDecoder(mirrored(config), config.codebook_dim, config.grid)
        self.pixel_head = pixel_head(config)
        self.post_init()


def quantizer(config: VQRAEConfig) -> Quantizer:
    """Build the quantizer that the configuration names."""
    if config.quantizer == "simvq":
        return SimVQ(config.codebook_size, config.codebook_dim, config.codebook_bias, config.train_codebook)
    return QUANTIZERS[config.quantizer](config.codebook_size, config.codebook_dim)


def pixel_head(config: VQRAEConfig) -> nn.Module:
    """Build the head that decodes the decoder's tokens [B, M, D] into pixel_values."""
    if config.pixel_head == "conv":
        return ConvHead(config.hidden_size, config.head_channels, config.head_multipliers, config.head_groups)
    return PatchHead(config.hidden_size, config.decoded_patch_size)


def with_new_head(tokenizer: VQRAE, **fields: Any) -> VQRAE:
    """Copy a tokenizer with another pixel head, which starts at random; everything else, ids included, stays.

    Args:
        fields: of `VQRAEConfig`: `pixel_head`, `head_channels`, `head_multipliers`, `head_groups`.

    Raises:
        UserError: another field, or a head that does not fit the patches.
    """
    if unknown := sorted(fields.keys() - HEAD_FIELDS):
        raise UserError(f"A new head has the settings {', '.join(sorted(HEAD_FIELDS))}, not {unknown[0]}.")
    new = VQRAE(VQRAEConfig(**{**tokenizer.config.to_dict(), **fields}))
    kept = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith("pixel_head.")}
    new.load_state_dict(kept | {f"pixel_head.{name}": value for name, value in new.pixel_head.state_dict().items()})
    return new


def mirrored(config: VQRAEConfig) -> PreTrainedConfig:
    """Return the configuration of the decoder's blocks: the encoder's, at the decoder's depth."""
    blocks = config.encoder_copy()
    blocks.num_hidden_layers = config.decoder_num_hidden_layers or blocks.num_hidden_layers
    blocks._attn_implementation = config._attn_implementation
    return blocks


register_tokenizer(VQRAE)
