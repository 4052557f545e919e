"""The name rules of each published layout: one table each, from the released code's parameter names to ours."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from unimm.conversion.rules import Rule, Target, layer, thirds

RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "shortcut"}
SPATIAL = {"norm": "norm", "q": "query", "k": "key", "v": "value", "proj_out": "output"}
MLP = {"w1": "gate", "w3": "up", "w2": "down"}
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}


def _any(names: dict[str, str]) -> str:
    return f"(?P<part>{'|'.join(names)})"


def _part(name: str, names: dict[str, str]) -> Target:
    """Return `name`, expanded, with our name of the matched part behind it."""
    return lambda found: f"{found.expand(name)}.{names[found['part']]}"


def _at(position: Callable[[int, int], int], rest: str | None = None) -> Target:
    """Return the name in the flat sequence of the pixel head's levels, by the numbers of level and block."""

    def name(found: re.Match[str]) -> str:
        place = position(int(found["level"]), int(found.groupdict().get("block") or 0))
        return f"pixel_head.levels.{place}.{rest or RESIDUAL[found['part']]}"

    return name


def _ends(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Return the rules of the first, middle and last layers of LlamaGen's convolutional encoder or decoder."""
    return (
        layer(rf"{theirs}\.conv_in", f"{ours}.inlet"),
        layer(rf"{theirs}\.mid\.([02])\.{_any(RESIDUAL)}", _part(rf"{ours}.middle.\1", RESIDUAL)),
        layer(rf"{theirs}\.mid\.1\.{_any(SPATIAL)}", _part(f"{ours}.middle.1", SPATIAL)),
        layer(rf"{theirs}\.norm_out", f"{ours}.norm"),
        layer(rf"{theirs}\.conv_out", f"{ours}.outlet"),
    )


# VFMTok's and IDEAL's pixel head: two blocks a level and an upsampling after each but the last.
_LEVEL = r"decoder\.conv_blocks\.(?P<level>\d+)"
_PIXEL_HEAD = (
    *_ends("decoder", "pixel_head"),
    layer(rf"{_LEVEL}\.res\.(?P<block>\d+)\.{_any(RESIDUAL)}", _at(lambda level, block: 3 * level + block)),
    layer(rf"{_LEVEL}\.upsample\.conv", _at(lambda level, _: 3 * level + 2, "conv")),
)
_QUANTIZER = (
    Rule(r"slot_quantize\.embedding\.weight", ("quantizer.codebook",)),
    Rule(r"slot_quantize\.codebook_used"),  # statistics of training
    layer("pre_slots_quant", "sampler.projection"),
    layer("post_slots_quant", "decoder.projection"),
)

_ENCODE, _DECODE = r"encode_transformer", r"decode_transformer"
_ANCHORS = rf"{_ENCODE}\.transformer\.layers\.(\d+)"
_BLOCKS = rf"{_DECODE}\.transformer\.layers\.(\d+)"

VFMTOK = (
    layer(rf"{_ENCODE}\.projectors\.(\d+)\.mlp\.(\d+)", r"sampler.adapters.\1.layers.\2"),
    layer(rf"{_ENCODE}\.norm_layers\.(\d+)", r"sampler.adapters.\1.layers.5"),
    Rule(rf"{_ENCODE}\.carrier_tokens", ("sampler.anchors",)),
    Rule(rf"{_ENCODE}\.slots_pos", ("sampler.positions",)),
    layer(rf"{_ENCODE}\.norm_pre1", "sampler.norm"),
    layer(rf"{_ANCHORS}\.cross_attn\.sampling_offsets", r"sampler.layers.\1.reading.offsets"),
    layer(rf"{_ANCHORS}\.cross_attn\.attention_weights", r"sampler.layers.\1.reading.weights"),
    layer(rf"{_ANCHORS}\.cross_attn\.(value|output)_proj", r"sampler.layers.\1.reading.\2"),
    layer(rf"{_ANCHORS}\.norm1", r"sampler.layers.\1.reading_norm"),
    layer(rf"{_ANCHORS}\.self_attn\.{_any(PROJECTIONS)}", _part(r"sampler.layers.\1.attention", PROJECTIONS)),
    layer(rf"{_ANCHORS}\.norm3", r"sampler.layers.\1.attention_norm"),
    layer(rf"{_ANCHORS}\.linear1", r"sampler.layers.\1.mlp.0"),
    layer(rf"{_ANCHORS}\.linear2", r"sampler.layers.\1.mlp.2"),
    layer(rf"{_ANCHORS}\.norm2", r"sampler.layers.\1.mlp_norm"),
    *_QUANTIZER,
    Rule(
        rf"{_DECODE}\.position_embedding",
        ("decoder.cls_position", "decoder.positions"),
        lambda table: (table[:, :1], table[:, 1:]),
    ),
    Rule(rf"{_DECODE}\.slot_position_embedding", ("decoder.code_positions",)),
    Rule(rf"{_DECODE}\.mask_embedding", ("decoder.mask_tokens[0]",)),
    Rule(rf"{_DECODE}\.mask_dino", ("decoder.mask_tokens[1]",)),
    Rule(rf"{_DECODE}\.cls_token", ("decoder.cls",)),
    Rule(rf"{_DECODE}\.register_tokens", ("decoder.registers",)),
    layer(rf"{_BLOCKS}\.norm1", r"decoder.blocks.\1.attention_norm"),
    layer(rf"{_BLOCKS}\.attn1\.{_any(PROJECTIONS)}", _part(r"decoder.blocks.\1.attention", PROJECTIONS)),
    layer(rf"{_BLOCKS}\.norm2", r"decoder.blocks.\1.mlp_norm"),
    layer(rf"{_BLOCKS}\.ffnet\.w12", r"decoder.blocks.\1.mlp.gate_and_value"),
    layer(rf"{_BLOCKS}\.ffnet\.w3", r"decoder.blocks.\1.mlp.output"),
    layer(rf"{_DECODE}\.norm_post1", "decoder.pixel_norm"),
    layer(rf"{_DECODE}\.norm_post2", "decoder.feature_norm"),
    layer(rf"{_DECODE}\.proj", "decoder.feature_head"),
    *_PIXEL_HEAD,
)


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Return the rules of torch's multi-head attention, whose query, key and value are one tensor."""
    names = tuple(f"{ours}.{name}" for name in ("query", "key", "value"))
    return (
        Rule(rf"{theirs}\.in_proj_(?P<kind>weight|bias)", tuple(rf"{name}.\g<kind>" for name in names), thirds),
        layer(rf"{theirs}\.out_proj", f"{ours}.output"),
    )


_TIMM = rf"{_ENCODE}\.backbone\.model"
_TIMM_BLOCK = rf"{_TIMM}\.blocks\.(\d+)"
_SIGLIP_LAYER = r"encoder.encoder.layers.\1"

IDEAL = (
    layer(rf"{_TIMM}\.patch_embed\.proj", "encoder.embeddings.patch_embedding"),
    Rule(rf"{_TIMM}\.pos_embed", ("encoder.embeddings.position_embedding.weight",), lambda table: (table[0],)),
    layer(rf"{_TIMM_BLOCK}\.norm([12])", rf"{_SIGLIP_LAYER}.layer_norm\2"),
    layer(
        rf"{_TIMM_BLOCK}\.attn\.qkv",
        f"{_SIGLIP_LAYER}.self_attn.q_proj",
        thirds,
        f"{_SIGLIP_LAYER}.self_attn.k_proj",
        f"{_SIGLIP_LAYER}.self_attn.v_proj",
    ),
    layer(rf"{_TIMM_BLOCK}\.attn\.proj", f"{_SIGLIP_LAYER}.self_attn.out_proj"),
    layer(rf"{_TIMM_BLOCK}\.mlp\.fc([12])", rf"{_SIGLIP_LAYER}.mlp.fc\2"),
    layer(rf"{_TIMM}\.norm", "encoder.post_layernorm"),
    Rule(rf"{_TIMM}\.attn_pool\..+"),  # pools for classification, after the features
    # A norm inside the frozen encoder: ours has no weights.
    Rule(rf"{_ENCODE}\.backbone\.spatial_norm\.weight", constant=1),
    Rule(rf"{_ENCODE}\.backbone\.spatial_norm\.bias", constant=0),
    layer(rf"{_ENCODE}\.attn_fuse\.query_norm", "sampler.deep_norm"),
    layer(rf"{_ENCODE}\.attn_fuse\.kv_norm", "sampler.shallow_norm"),
    *_attention(rf"{_ENCODE}\.attn_fuse\.attn", "sampler.attention"),
    layer(rf"{_ENCODE}\.attn_fuse\.ffn_norm", "sampler.mlp_norm"),
    layer(rf"{_ENCODE}\.attn_fuse\.ffn\.([03])", r"sampler.mlp.\1"),
    *_QUANTIZER,
    Rule(rf"{_DECODE}\.slot_position_embedding", ("decoder.positions",)),
    Rule(rf"{_DECODE}\.cls_pos_embedding", ("decoder.cls_position",)),
    Rule(rf"{_DECODE}\.cls_token", ("decoder.cls",)),
    Rule(rf"{_DECODE}\.register_tokens", ("decoder.registers",)),
    layer(rf"{_BLOCKS}\.norm1", r"decoder.blocks.\1.attention_norm"),
    *_attention(rf"{_BLOCKS}\.attn", r"decoder.blocks.\1.attention"),
    layer(rf"{_BLOCKS}\.norm2", r"decoder.blocks.\1.mlp_norm"),
    layer(rf"{_BLOCKS}\.ffn\.net\.([03])", r"decoder.blocks.\1.mlp.\2"),
    layer(rf"{_DECODE}\.norm_post", "decoder.norm"),
    layer(rf"{_DECODE}\.project_semantic", "decoder.deep_head"),
    layer(rf"{_DECODE}\.project_shallow", "decoder.shallow_head"),
    *_PIXEL_HEAD,
)


def _flat(tensor: Tensor) -> Sequence[Tensor]:
    """Return a 1x1 convolution's weight as that of a linear layer; a bias stays as it is."""
    return (tensor.flatten(1) if tensor.ndim > 1 else tensor,)


def _stack(theirs: str, ours: str, resample: str) -> tuple[Rule, ...]:
    level = rf"{theirs}\.conv_blocks\.(\d+)"
    return (
        *_ends(theirs, ours),
        layer(rf"{level}\.res\.(\d+)\.{_any(RESIDUAL)}", _part(rf"{ours}.levels.\1.blocks.\2", RESIDUAL)),
        layer(rf"{level}\.attn\.(\d+)\.{_any(SPATIAL)}", _part(rf"{ours}.levels.\1.attention.\2", SPATIAL)),
        layer(rf"{level}\.{resample}\.conv", rf"{ours}.levels.\1.resample.conv"),
    )


VQ = (
    *_stack("encoder", "encoder", "downsample"),
    layer("quant_conv", "sampler.projection", _flat),
    Rule(r"quantize\.embedding\.weight", ("quantizer.codebook",)),
    Rule(r"quantize\.codebook_used"),  # statistics of training
    layer("post_quant_conv", "decoder", _flat),
    *_stack("decoder", "pixel_head", "upsample"),
)

GPT = (
    Rule(r"cls_embedding\.embedding_table\.weight", ("class_embedding.weight",)),
    Rule(r"tok_embeddings\.weight", ("id_embedding.weight",)),
    Rule(r"layers\.(\d+)\.attention\.wqkv\.weight", (r"blocks.\1.attention.qkv.weight",)),
    Rule(r"layers\.(\d+)\.attention\.wo\.weight", (r"blocks.\1.attention.out.weight",)),
    layer(rf"layers\.(\d+)\.feed_forward\.{_any(MLP)}", _part(r"blocks.\1.feed_forward", MLP)),
    Rule(r"layers\.(\d+)\.attention_norm\.weight", (r"blocks.\1.attention_norm.weight",)),
    Rule(r"layers\.(\d+)\.ffn_norm\.weight", (r"blocks.\1.feed_forward_norm.weight",)),
    Rule(r"norm\.weight", ("norm.weight",)),
    Rule(r"output\.weight", ("head.weight",)),
    Rule(r"freqs_cis|layers\.\d+\.attention\.kv_cache\.[kv]_cache"),  # computed, and the cache of a run
)


@dataclass(frozen=True)
class Layout:
    """A published layout.

    Args:
        rules: its name rules.
        kept_under: the keys of a training checkpoint that may hold the weights, the one that its authors sample with
            first.
    """

    rules: tuple[Rule, ...]
    kept_under: tuple[str, ...]


_EMA_FIRST = ("ema", "model", "module", "state_dict")
LAYOUTS = {
    "vfmtok": Layout(VFMTOK, _EMA_FIRST),
    "vfmtok-gpt": Layout(GPT, _EMA_FIRST),
    "ideal": Layout(IDEAL, _EMA_FIRST),
    "ideal-gpt": Layout(GPT, _EMA_FIRST),
    "llamagen-vq": Layout(VQ, ("model", "module", "state_dict")),
    "llamagen-gpt": Layout(GPT, ("model", "module", "state_dict")),
}
