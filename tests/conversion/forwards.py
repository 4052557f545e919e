"""The published models' forward passes in plain float64 (`published.Plain`), from the specifications."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conversion.published import Plain, split_attention, standardized, swish


def llamagen_vq_encode(p: Plain, pixels: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] to ids [B, M] and codes [B, M, C]."""
    x = p.conv("encoder.conv_in", pixels, padding=1)
    for level in range(levels):
        place = f"encoder.conv_blocks.{level}"
        for k in range(2):
            x = p.residual(f"{place}.res.{k}", x)
            x = p.spatial(f"{place}.attn.{k}", x) if level == levels - 1 else x
        if level < levels - 1:
            x = p.conv(f"{place}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = p.middle("encoder", x)
    x = p.conv("encoder.conv_out", swish(p.group_norm("encoder.norm_out", x)), padding=1)
    return p.nearest("quantize.embedding.weight", p.linear("quant_conv", x.flatten(2).transpose(1, 2)))


def llamagen_vq_decode(p: Plain, codes: Tensor, side: int, levels: int) -> Tensor:
    maps = p.linear("post_quant_conv", codes).transpose(1, 2).unflatten(2, (side, side))
    return p.conv_decoder(maps, levels, 3)


# ---- VFMTok ----


def deformable(p: Plain, name: str, queries: Tensor, values: Tensor, anchors: int, side: int) -> Tensor:
    """Deformable attention, 8 heads, 4 levels of side x side, 4 points: every sample by hand."""
    batch, length, width = queries.shape
    values = p.linear(f"{name}.value_proj", values).view(batch, 4, side, side, 8, width // 8)
    offsets = p.linear(f"{name}.sampling_offsets", queries).view(batch, length, 8, 4, 4, 2)
    weights = p.linear(f"{name}.attention_weights", queries).view(batch, length, 8, 16).softmax(-1)
    out = queries.new_zeros(batch, length, 8, width // 8)
    for b in range(batch):
        for n in range(length):
            centre = ((n % anchors + 0.5) / anchors, (n // anchors + 0.5) / anchors)
            for head in range(8):
                for k in range(16):
                    level, point = divmod(k, 4)
                    dx, dy = offsets[b, n, head, level, point].tolist()
                    x, y = centre[0] * side + dx - 0.5, centre[1] * side + dy - 0.5
                    for row in (math.floor(y), math.floor(y) + 1):
                        for column in (math.floor(x), math.floor(x) + 1):
                            if 0 <= row < side and 0 <= column < side:
                                share = (1 - abs(y - row)) * (1 - abs(x - column))
                                out[b, n, head] += weights[b, n, head, k] * share * values[b, level, row, column, head]
    return p.linear(f"{name}.output_proj", out.flatten(2))


def vfmtok_encode(p: Plain, levels: list[Tensor], anchors: int, depth: int) -> tuple[Tensor, Tensor]:
    """Four levels of encoder features [B, N, D] to ids and codes."""
    side, flat = math.isqrt(levels[0].shape[1]), []
    for k, level in enumerate(levels):
        mlp = f"encode_transformer.projectors.{k}.mlp"
        x = p.norm(f"{mlp}.1", p.linear(f"{mlp}.0", level)).clamp(min=0)
        flat.append(p.norm(f"encode_transformer.norm_layers.{k}", p.norm(f"{mlp}.4", p.linear(f"{mlp}.3", x))))
    values, positions = torch.cat(flat, 1), p["encode_transformer.slots_pos"]
    s = p.norm("encode_transformer.norm_pre1", p["encode_transformer.carrier_tokens"]).repeat(len(values), 1, 1)
    for k in range(depth):
        layer = f"encode_transformer.transformer.layers.{k}"
        s = p.norm(f"{layer}.norm1", s + deformable(p, f"{layer}.cross_attn", s + positions, values, anchors, side))
        q = s + positions
        s = p.norm(f"{layer}.norm3", s + p.attention(f"{layer}.self_attn", q, q, q, causal=True))
        s = p.norm(f"{layer}.norm2", s + p.linear(f"{layer}.linear2", p.linear(f"{layer}.linear1", s).clamp(min=0)))
    return p.nearest("slot_quantize.embedding.weight", p.linear("pre_slots_quant", s))


def vfmtok_decode(p: Plain, codes: Tensor, side: int, depth: int, levels: int) -> tuple[Tensor, Tensor]:
    """Codes to pixels in about [-1, 1], decoded from side x side tokens, and features."""
    memory = p.linear("post_slots_quant", codes) + p["decode_transformer.slot_position_embedding"]
    memory = p.norm("decode_transformer.norm_post1", memory)
    table = p["decode_transformer.position_embedding"]
    first, patches = table[:, :1], table[:, 1:]
    old = math.isqrt(patches.shape[1])
    maps = patches.transpose(1, 2).unflatten(2, (old, old))
    resized = F.interpolate(maps, scale_factor=((side + 0.1) / old,) * 2, mode="bicubic").flatten(2).transpose(1, 2)

    def branch(mask: str, positions: Tensor, norm: str) -> Tensor:
        name = "decode_transformer"
        asked = [p[f"{name}.cls_token"] + first, p[f"{name}.{mask}"] + positions, p[f"{name}.register_tokens"]]
        asked_for = p.norm(f"{name}.{norm}", torch.cat(asked, 1)).repeat(len(codes), 1, 1)
        x = torch.cat([memory, asked_for], 1)
        for k in range(depth):
            block = f"{name}.transformer.layers.{k}"
            h = p.norm(f"{block}.norm1", x)
            x = x + p.attention(f"{block}.attn1", h, h, h, causal=True)
            gate, value = p.linear(f"{block}.ffnet.w12", p.norm(f"{block}.norm2", x)).chunk(2, -1)
            x = x + p.linear(f"{block}.ffnet.w3", swish(gate) * value)
        start = codes.shape[1] + 1
        return x[:, start : start + positions.shape[1]]

    tokens = branch("mask_embedding", resized, "norm_post1")
    features = p.linear("decode_transformer.proj", branch("mask_dino", patches, "norm_post2"))
    return p.conv_decoder(tokens.transpose(1, 2).unflatten(2, (side, side)), levels, 2), features


# ---- IDEAL ----


def timm_levels(p: Plain, images: Tensor, depth: int, heads: int, shallow: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] (the encoder's normalization) to the shallow and the deep level."""
    trunk = "encode_transformer.backbone.model"
    weight = p[f"{trunk}.patch_embed.proj.weight"]
    x = (
        F.conv2d(images, weight, p[f"{trunk}.patch_embed.proj.bias"], stride=weight.shape[-1])
        .flatten(2)
        .transpose(1, 2)
    )
    x, kept = x + p[f"{trunk}.pos_embed"], []
    for k in range(depth):
        block = f"{trunk}.blocks.{k}"
        q, key, v = p.linear(f"{block}.attn.qkv", p.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + p.linear(f"{block}.attn.proj", split_attention(q, key, v, heads))
        x = x + p.linear(f"{block}.mlp.fc2", gelu(p.linear(f"{block}.mlp.fc1", p.norm(f"{block}.norm2", x, 1e-6))))
        kept.append(x)
    return standardized(kept[shallow - 1], 1e-6), p.norm(f"{trunk}.norm", kept[-1], 1e-6)


def ideal_encode(p: Plain, shallow: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
    fusion = "encode_transformer.attn_fuse"
    memory = p.norm(f"{fusion}.kv_norm", shallow)
    s = deep + p.attention(f"{fusion}.attn", p.norm(f"{fusion}.query_norm", deep), memory, memory)
    s = s + p.linear(f"{fusion}.ffn.3", gelu(p.linear(f"{fusion}.ffn.0", p.norm(f"{fusion}.ffn_norm", s))))
    return p.nearest("slot_quantize.embedding.weight", p.linear("pre_slots_quant", s))


def ideal_decode(p: Plain, codes: Tensor, layers: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes to pixels in about [-1, 1], deep and shallow features."""
    name, count = "decode_transformer", codes.shape[1]
    tokens = p.linear("post_slots_quant", codes) + p[f"{name}.slot_position_embedding"]
    ends = [
        table.repeat(len(codes), 1, 1)
        for table in (p[f"{name}.cls_token"] + p[f"{name}.cls_pos_embedding"], p[f"{name}.register_tokens"])
    ]
    x = p.norm(f"{name}.norm_post", torch.cat([ends[0], tokens, ends[1]], 1))
    for k in range(layers):
        block = f"{name}.transformer.layers.{k}"
        h = p.norm(f"{block}.norm1", x)
        x = x + p.attention(f"{block}.attn", h, h, h)
        x = x + p.linear(f"{block}.ffn.net.3", gelu(p.linear(f"{block}.ffn.net.0", p.norm(f"{block}.norm2", x))))
    x, side = x[:, 1 : 1 + count], math.isqrt(count)
    deep, shallow = p.linear(f"{name}.project_semantic", x), p.linear(f"{name}.project_shallow", x)
    return p.conv_decoder(deep.transpose(1, 2).unflatten(2, (side, side)), levels, 2), deep, shallow


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


# ---- LlamaGen's GPT ----


def gpt_logits(p: Plain, labels: Tensor, ids: Tensor, heads: int, depth: int, side: int) -> Tensor:
    """Logits [B, M, K] of every id given the class and the ids before it."""
    x = torch.cat(
        [p["cls_embedding.embedding_table.weight"][labels][:, None], p["tok_embeddings.weight"][ids[:, :-1]]], 1
    )
    length, head = x.shape[1], x.shape[2] // heads

    def turned(t: Tensor) -> Tensor:
        """Rotate the pairs of [B, L, heads, head]: the first half of them with the row, the second with the column."""
        out, quarter = torch.zeros_like(t), head // 4  # position 0, the class, stays zero: cosine and sine are 0 there
        for n in range(1, length):
            row, column = divmod(n - 1, side)
            for j in range(head // 2):
                place, k = (row, j) if j < quarter else (column, j - quarter)
                angle = place * 10000 ** (-k / quarter)
                a, b = t[:, n, :, 2 * j], t[:, n, :, 2 * j + 1]
                out[:, n, :, 2 * j] = a * math.cos(angle) - b * math.sin(angle)
                out[:, n, :, 2 * j + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    for k in range(depth):
        layer = f"layers.{k}"
        q, key, v = p.linear(f"{layer}.attention.wqkv", rms(x, p[f"{layer}.attention_norm.weight"])).chunk(3, -1)
        q, key = (turned(t.unflatten(-1, (heads, head))).flatten(2) for t in (q, key))
        x = x + p.linear(f"{layer}.attention.wo", split_attention(q, key, v, heads, causal=True))
        h = rms(x, p[f"{layer}.ffn_norm.weight"])
        inner = swish(p.linear(f"{layer}.feed_forward.w1", h)) * p.linear(f"{layer}.feed_forward.w3", h)
        x = x + p.linear(f"{layer}.feed_forward.w2", inner)
    return p.linear("output", rms(x, p["norm.weight"]))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
