"""IDEAL: a discrete autoencoder of a frozen vision foundation model's features (arXiv 2606.11096).

Each code represents two encoder levels. A deep level cross-attends to a shallow one for detail, the fused features are
quantized and decoded into both levels, and the pixels are decoded from the predicted deep features alone.
"""

from torch import Tensor

from unimm.tokenizer.configuration import IDEALConfig
from unimm.tokenizer.decoders import FeatureDecoder
from unimm.tokenizer.encoders import build_encoder
from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.pixel_heads import ConvHead
from unimm.tokenizer.quantizers import NormalizedVQ
from unimm.tokenizer.registry import register_tokenizer
from unimm.tokenizer.samplers import FusionSampler, plain_norm


class IDEAL(ImageTokenizer):
    """IDEAL: image -> encoder -> (shallow, deep) -> fusion -> VQ -> blocks -> (shallow, deep -> convolutions)."""

    config_class = IDEALConfig
    trains_encoder = False

    def __init__(self, config: IDEALConfig) -> None:
        super().__init__(config)
        c = config
        self.encoder = build_encoder(c.encoder_copy(), c._attn_implementation)
        self.sampler = FusionSampler(
            c.hidden_size,
            c.codebook_dim,
            heads=c.num_heads,
            inner=c.fusion_inner_size or 2 * c.hidden_size,
            dropout=c.dropout,
        )
        self.quantizer = NormalizedVQ(c.codebook_size, c.codebook_dim)
        self.decoder = FeatureDecoder(
            c.codebook_dim,
            c.hidden_size,
            heads=c.num_heads,
            depth=c.decoder_num_layers,
            inner=c.decoder_inner_size or 2 * c.hidden_size,
            grid=c.grid,
            registers=c.num_registers,
            dropout=c.dropout,
        )
        self.pixel_head = ConvHead(c.hidden_size, c.head_channels, c.head_multipliers)
        self.post_init()

    def sources(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Select the shallow level, normalized without weights, and the deep one, each [B, N, D]."""
        return plain_norm(states[self.config.shallow_level]), states[self.config.deep_level]

    def targets(self, sources: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return both levels, detached."""
        shallow, deep = sources
        return {"deep": deep.detach(), "shallow": shallow.detach()}

    def draw(self, codes: Tensor, grid: tuple[int, int], *, predict: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode codes [B, M, C] into unclamped pixels [B, 3, H, W] and, if `predict`, both levels, each [B, M, D]."""
        deep, shallow = self.decoder(codes, grid)
        pixels = (self.pixel_head(deep, grid).float() + 1) / 2
        return pixels, {"deep": deep, "shallow": shallow} if predict else {}


register_tokenizer(IDEAL)
