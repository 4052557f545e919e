"""VQRAE: a vector-quantized representation autoencoder (arXiv 2511.23386, figure 2).

One pretrained encoder has two outputs: continuous features for understanding, and ids of a high-dimensional SimVQ
codebook over the same features, which a ViT that mirrors the encoder decodes into pixels. The patch embedding is the
only convolution.
"""

from transformers import PreTrainedConfig

from unimm.tokenizer.configuration import VQRAEConfig
from unimm.tokenizer.decoders import SymmetricViTDecoder
from unimm.tokenizer.encoders import build_encoder
from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.pixel_heads import PatchHead
from unimm.tokenizer.quantizers import SimVQ
from unimm.tokenizer.samplers import GridSampler


class VQRAE(ImageTokenizer):
    """VQRAE: image -> encoder -> features -> in-projection -> SimVQ -> out-projection -> mirrored blocks -> patches."""

    config_class = VQRAEConfig

    def __init__(self, config: VQRAEConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config.encoder_copy(), config._attn_implementation)
        self.sampler = GridSampler(config.hidden_size, config.codebook_dim, config.pre_quant_norm)
        self.quantizer = SimVQ(config.codebook_size, config.codebook_dim, config.codebook_bias, config.train_codebook)
        self.decoder = SymmetricViTDecoder(mirrored(config), config.codebook_dim, config.grid)
        self.pixel_head = PatchHead(config.hidden_size, config.decoded_patch_size)
        self.post_init()


def mirrored(config: VQRAEConfig) -> PreTrainedConfig:
    """Return the configuration of the decoder's blocks: the encoder's, at the decoder's depth."""
    blocks = config.encoder_copy()
    blocks.num_hidden_layers = config.decoder_num_hidden_layers or blocks.num_hidden_layers
    blocks._attn_implementation = config._attn_implementation
    return blocks
