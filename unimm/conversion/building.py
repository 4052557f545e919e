"""Build the models of this library that a published checkpoint fills; their sizes are read from its shapes.

What shapes do not tell is fixed in the released code: 8 heads in VFMTok's and IDEAL's layers, heads of width 64 in
SigLIP, and the encoder levels that are sampled.
"""

import math
from typing import Any

from transformers import SiglipVisionConfig

from unimm.class_conditional.configuration import SIZES, ClassConditionalConfig
from unimm.class_conditional.modeling import ClassConditionalGPT
from unimm.conversion.rules import Shapes
from unimm.errors import UserError
from unimm.tokenizer.configuration import IDEALConfig, side
from unimm.tokenizer.ideal import IDEAL
from unimm.tokenizer.llamagen_vq import ConvEncoderConfig, LlamaGenVQ, LlamaGenVQConfig
from unimm.tokenizer.modeling import ImageTokenizer
from unimm.tokenizer.pretrained import find_encoder
from unimm.tokenizer.vfmtok import VFMTok

HEADS = 8
SIGLIP_HEAD = 64
VFMTOK_ENCODER = "dinov2-reg-l-p14-518"


def build_vfmtok(shapes: Shapes, encoder: str | None) -> VFMTok:
    """Build VFMTok around a pretrained encoder (None: DINOv2-L with registers), whose weights it loads.

    Raises:
        UserError: the encoder cannot be read, or does not have the features that the checkpoint was trained on.
    """
    source = find_encoder(encoder or VFMTOK_ENCODER)
    given, wanted = source.config.hidden_size, shapes.of("encode_transformer.projectors.0.mlp.0.weight")[1]
    if given != wanted:
        raise UserError(f"The encoder {source.path} has features of width {given}, and {shapes.source} takes {wanted}.")
    fields = vfmtok_fields(shapes, source.config.num_hidden_layers)
    patches = shapes.side(shapes.of("decode_transformer.position_embedding")[1] - 1, "patch positions")
    return VFMTok.from_encoder(encoder or VFMTOK_ENCODER, image_size=patches * side(source.config.patch_size), **fields)


def vfmtok_fields(shapes: Shapes, depth: int) -> dict[str, Any]:
    """Read the fields of a `VFMTokConfig` from the shapes; `depth` is the encoder's number of layers."""
    _, anchors, width = shapes.of("encode_transformer.carrier_tokens")
    levels = shapes.count(r"encode_transformer\.norm_layers\.(\d+)")
    layer, block = "encode_transformer.transformer.layers.0", "decode_transformer.transformer.layers.0"
    return {
        "levels": [depth * (k + 1) // levels for k in range(levels)],
        "anchor_grid": shapes.side(anchors, "anchors"),
        "width": width,
        "num_heads": HEADS,
        "sampler_num_layers": shapes.count(r"encode_transformer\.transformer\.layers\.(\d+)"),
        "sampler_points": shapes.of(f"{layer}.cross_attn.sampling_offsets.weight")[0] // (2 * HEADS * levels),
        "sampler_inner_size": shapes.of(f"{layer}.linear1.weight")[0],
        "decoder_num_layers": shapes.count(r"decode_transformer\.transformer\.layers\.(\d+)"),
        "decoder_inner_size": swiglu_size(shapes.of(f"{block}.ffnet.w3.weight")[1]),
        "num_registers": shapes.of("decode_transformer.register_tokens")[1],
        "share_mask_token": False,
        **_codebook(shapes),
        **_head(shapes),
    }


def swiglu_size(inner: int) -> int:
    """Return the MLP width of which SwiGLU's `inner` is two thirds, rounded up to a multiple of 8."""
    power = 2 ** round(math.log2(inner * 3 / 2))  # the published widths are powers of two
    return power if math.ceil(power * 2 / 3 / 8) * 8 == inner else inner * 3 // 2


def build_ideal(shapes: Shapes) -> IDEAL:
    """Build IDEAL with a SigLIP encoder of timm's layout; the checkpoint holds all its weights."""
    trunk, fusion = "encode_transformer.backbone.model", "encode_transformer.attn_fuse"
    width, _, patch, _ = shapes.of(f"{trunk}.patch_embed.proj.weight")
    depth = shapes.count(r"encode_transformer\.backbone\.model\.blocks\.(\d+)")
    patches = shapes.side(shapes.of(f"{trunk}.pos_embed")[1], "patch positions")
    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes.of(f"{trunk}.blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // SIGLIP_HEAD),
        image_size=patches * patch,
        patch_size=patch,
        hidden_act="gelu",  # timm's, not SigLIP's approximation by tanh
    )
    config = IDEALConfig(
        encoder_config=vision,
        shallow_level=max(1, depth // 3),  # the 8th of 24
        deep_level=depth,
        num_heads=HEADS,
        fusion_inner_size=shapes.of(f"{fusion}.ffn.0.weight")[0],
        decoder_num_layers=shapes.count(r"decode_transformer\.transformer\.layers\.(\d+)"),
        decoder_inner_size=shapes.of("decode_transformer.transformer.layers.0.ffn.net.0.weight")[0],
        num_registers=shapes.of("decode_transformer.register_tokens")[1],
        **_codebook(shapes),
        **_head(shapes),
    )
    return IDEAL(config)


def build_gpt(shapes: Shapes, tokenizer: ImageTokenizer) -> ClassConditionalGPT:
    """Build the GPT that draws the ids of `tokenizer`.

    Raises:
        UserError: its size is none of the published ones, or its ids are not those of the tokenizer.
    """
    codes, width = shapes.of("tok_embeddings.weight")
    if codes != tokenizer.config.codebook_size:
        raise UserError(
            f"{shapes.source} draws {codes} ids, and the image tokenizer has {tokenizer.config.codebook_size}."
        )
    depth = shapes.count(r"layers\.(\d+)")
    heads = next((heads for layers, heads, size in SIZES.values() if (layers, size) == (depth, width)), None)
    if heads is None:
        known = ", ".join(f"{layers} x {size} ({name})" for name, (layers, _, size) in SIZES.items())
        raise UserError(f"{shapes.source} has {depth} layers of width {width}; the published sizes are {known}.")
    return ClassConditionalGPT(
        ClassConditionalConfig(
            codebook_size=codes,
            grid=tokenizer.config.grid,
            num_classes=shapes.of("cls_embedding.embedding_table.weight")[0] - 1,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=shapes.of("layers.0.feed_forward.w1.weight")[0],
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
    )


def build_vq(shapes: Shapes, image_size: int) -> LlamaGenVQ:
    """Build LlamaGen's VQ for images of `image_size` pixels, a number that its weights do not fix."""
    (channels, *_), (codes, width) = shapes.of("encoder.conv_in.weight"), shapes.of("quantize.embedding.weight")
    levels = shapes.count(r"encoder\.conv_blocks\.(\d+)")
    widths = [shapes.of(f"encoder.conv_blocks.{level}.res.0.conv1.weight")[0] for level in range(levels)]
    vision = ConvEncoderConfig(
        image_size=image_size,
        hidden_size=shapes.of("encoder.conv_out.weight")[0],
        head_channels=channels,
        head_multipliers=[each // channels for each in widths],
        num_blocks=shapes.count(r"encoder\.conv_blocks\.0\.res\.(\d+)"),
    )
    return LlamaGenVQ(LlamaGenVQConfig(encoder_config=vision, codebook_size=codes, codebook_dim=width))


def _codebook(shapes: Shapes) -> dict[str, int]:
    size, width = shapes.of("slot_quantize.embedding.weight")
    return {"codebook_size": size, "codebook_dim": width}


def _head(shapes: Shapes) -> dict[str, object]:
    """Return the fields of the convolutional pixel head: channels and multipliers, full resolution first."""
    levels = shapes.count(r"decoder\.conv_blocks\.(\d+)")
    widths = [shapes.of(f"decoder.conv_blocks.{level}.res.0.conv1.weight")[0] for level in reversed(range(levels))]
    return {"head_channels": widths[0], "head_multipliers": [width // widths[0] for width in widths]}
