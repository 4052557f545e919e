"""VFMTok: an image tokenizer on a frozen vision foundation model (arXiv 2507.08441).

Ids do not correspond to patches. Learned anchors sample several encoder levels (four by default) at learned offsets,
and a causal ViT decodes their codes into pixels and into the encoder's last features. The number M and the grid of the
ids are therefore free, but images must have the size that the anchors were configured for.
"""

from torch import Tensor

from unimm.errors import UserError
from unimm.tokenizer.configuration import VFMTokConfig
from unimm.tokenizer.decoders import CausalDecoder
from unimm.tokenizer.encoders import build_encoder
from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.pixel_heads import ConvHead
from unimm.tokenizer.quantizers import NormalizedVQ
from unimm.tokenizer.registry import register_tokenizer
from unimm.tokenizer.samplers import AnchorSampler


class VFMTok(ImageTokenizer):
    """VFMTok: image -> encoder -> levels -> anchors -> VQ -> causal ViT -> (pixel tokens -> ConvHead | features)."""

    config_class = VFMTokConfig
    trains_encoder = False
    ids_are_patches = False

    def __init__(self, config: VFMTokConfig) -> None:
        super().__init__(config)
        c = config
        self.encoder = build_encoder(c.encoder_copy(), c._attn_implementation)
        self.sampler = AnchorSampler(
            c.hidden_size,
            c.width,
            c.codebook_dim,
            heads=c.num_heads,
            depth=c.sampler_num_layers,
            points=c.sampler_points,
            inner=c.sampler_inner_size,
            levels=len(c.levels),
            anchor_grid=c.grid,
            patch_grid=c.patch_grid,
        )
        self.quantizer = NormalizedVQ(c.codebook_size, c.codebook_dim)
        self.decoder = CausalDecoder(
            c.codebook_dim,
            c.width,
            c.hidden_size,
            heads=c.num_heads,
            depth=c.decoder_num_layers,
            inner=c.decoder_inner_size,
            anchors=c.num_image_tokens,
            pixel_grid=c.pixel_grid,
            feature_grid=c.patch_grid,
            registers=c.num_registers,
            share_mask_token=c.share_mask_token,
            dropout=c.decoder_dropout,
        )
        self.pixel_head = ConvHead(c.width, c.head_channels, c.head_multipliers)
        self.post_init()

    def sources(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Select the sampled levels, each [B, N, D]."""
        return tuple(states[level] for level in self.config.levels)

    def targets(self, sources: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the last level, the target of the feature branch."""
        return {"deep": sources[-1].detach()}

    def draw(self, codes: Tensor, grid: tuple[int, int], *, predict: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode codes [B, M, C] into unclamped pixels [B, 3, H, W] and, if `predict`, features [B, N, D].

        Raises:
            UserError: `grid` is not the anchors' grid.
        """
        if grid != self.config.grid:
            raise UserError(
                f"The anchors lie on a grid of {self.config.grid[0]} x {self.config.grid[1]}, and {grid[0]} x {grid[1]}"
                " is asked for: these images have one size."
            )
        pixels = (self.pixel_head(self.decoder(codes), self.config.pixel_grid).float() + 1) / 2
        return pixels, {"deep": self.decoder.features(codes)} if predict else {}

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Return the anchors' grid. Raises UserError if the images do not have the configured size."""
        (height, width), side = pixel_values.shape[-2:], self.config.image_size
        if (height, width) != (side, side):
            raise UserError(
                f"The {self.config.grid[0]} x {self.config.grid[1]} anchors were laid out for images of {side} x "
                f"{side} pixels, and these have {height} x {width}."
            )
        return self.config.grid


register_tokenizer(VFMTok)
