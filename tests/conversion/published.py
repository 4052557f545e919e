"""The published layouts, apart from the library: parameter names and shapes, and what the modules compute, in plain
torch functions in float64 on such a table of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def linear(name: str, before: int, after: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (after, before)} | ({f"{name}.bias": (after,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, before: int, after: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (after, before, side, side), f"{name}.bias": (after,)}


def joined(*parts: Shapes) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


# ---- names and shapes ----


def residual(name: str, before: int, after: int) -> Shapes:
    return joined(
        norm(f"{name}.norm1", before),
        conv(f"{name}.conv1", before, after),
        norm(f"{name}.norm2", after),
        conv(f"{name}.conv2", after, after),
        {} if before == after else conv(f"{name}.nin_shortcut", before, after, 1),
    )


def spatial(name: str, width: int) -> Shapes:
    return joined(
        norm(f"{name}.norm", width), *(conv(f"{name}.{k}", width, width, 1) for k in ("q", "k", "v", "proj_out"))
    )


def conv_stack(
    name: str, before: int, after: int, sizes: list[int], blocks: int, resample: str, attends: int | None
) -> Shapes:
    """`sizes` in the order of the levels; attention in level `attends`."""
    middle = sizes[-1] if resample == "downsample" else sizes[0]
    parts = [conv(f"{name}.conv_in", before, sizes[0])]
    parts += [residual(f"{name}.mid.{k}", middle, middle) for k in (0, 2)] + [spatial(f"{name}.mid.1", middle)]
    for level, (width, wider) in enumerate(zip([sizes[0], *sizes], sizes, strict=False)):
        for k in range(blocks):
            parts.append(residual(f"{name}.conv_blocks.{level}.res.{k}", width if k == 0 else wider, wider))
            parts += [spatial(f"{name}.conv_blocks.{level}.attn.{k}", wider)] if level == attends else []
        parts += [conv(f"{name}.conv_blocks.{level}.{resample}.conv", wider, wider)] if level < len(sizes) - 1 else []
    return joined(*parts, norm(f"{name}.norm_out", sizes[-1]), conv(f"{name}.conv_out", sizes[-1], after))


def llamagen_vq(
    channels: int = 128, multiples: tuple[int, ...] = (1, 1, 2, 2, 4), z: int = 256, codes: int = 16384, dim: int = 8
) -> Shapes:
    sizes = [channels * multiple for multiple in multiples]
    return joined(
        conv_stack("encoder", 3, z, sizes, 2, "downsample", len(sizes) - 1),
        conv_stack("decoder", z, 3, sizes[::-1], 3, "upsample", 0),
        {"quantize.embedding.weight": (codes, dim), "quantize.codebook_used": (65536,)},
        conv("quant_conv", z, dim, 1),
        conv("post_quant_conv", dim, z, 1),
    )


def pixel_head(width: int, channels: int, multiples: tuple[int, ...]) -> Shapes:
    return conv_stack("decoder", width, 3, [channels * m for m in reversed(multiples)], 2, "upsample", None)


def quantizer(width: int, codes: int, dim: int) -> Shapes:
    return joined(
        {"slot_quantize.embedding.weight": (codes, dim), "slot_quantize.codebook_used": (65536,)},
        linear("pre_slots_quant", width, dim),
        linear("post_slots_quant", dim, width),
    )


def four(name: str, width: int) -> Shapes:
    return joined(*(linear(f"{name}.{k}_proj", width, width) for k in ("q", "k", "v", "out")))


def vfmtok(
    hidden: int = 1024,
    width: int = 512,
    anchors: int = 256,
    patches: int = 576,
    depth: int = 6,
    inner: int = 1024,
    swiglu: int = 1368,
    codes: int = 16384,
    dim: int = 12,
    channels: int = 128,
    multiples: tuple[int, ...] = (1, 1, 2, 2, 4),
) -> Shapes:
    levels, heads, points = 4, 8, 4
    enc, dec = "encode_transformer", "decode_transformer"
    parts: list[Shapes] = []
    for k in range(levels):
        mlp = f"{enc}.projectors.{k}.mlp"
        parts += [linear(f"{mlp}.0", hidden, width, False), norm(f"{mlp}.1", width)]
        parts += [
            linear(f"{mlp}.3", width, width, False),
            norm(f"{mlp}.4", width),
            norm(f"{enc}.norm_layers.{k}", width),
        ]
    parts += [{f"{enc}.carrier_tokens": (1, anchors, width), f"{enc}.slots_pos": (1, anchors, width)}]
    for k in range(depth):
        layer = f"{enc}.transformer.layers.{k}"
        parts += [linear(f"{layer}.cross_attn.sampling_offsets", width, heads * levels * points * 2)]
        parts += [linear(f"{layer}.cross_attn.attention_weights", width, heads * levels * points)]
        parts += [linear(f"{layer}.cross_attn.{k}_proj", width, width) for k in ("value", "output")]
        parts += [linear(f"{layer}.linear1", width, inner), linear(f"{layer}.linear2", inner, width)]
        parts += [four(f"{layer}.self_attn", width), *(norm(f"{layer}.norm{n}", width) for n in (1, 2, 3))]
    for k in range(depth):
        block = f"{dec}.transformer.layers.{k}"
        parts += [norm(f"{block}.norm1", width), norm(f"{block}.norm2", width), four(f"{block}.attn1", width)]
        parts += [linear(f"{block}.ffnet.w12", width, 2 * swiglu), linear(f"{block}.ffnet.w3", swiglu, width)]
    tables = {"position_embedding": 1 + patches, "slot_position_embedding": anchors, "register_tokens": 4}
    tables |= dict.fromkeys(("mask_embedding", "mask_dino", "cls_token"), 1)
    parts += [{f"{dec}.{name}": (1, rows, width) for name, rows in tables.items()}]
    parts += [norm(f"{enc}.norm_pre1", width), norm(f"{dec}.norm_post1", width), norm(f"{dec}.norm_post2", width)]
    parts += [
        linear(f"{dec}.proj", width, hidden),
        quantizer(width, codes, dim),
        pixel_head(width, channels, multiples),
    ]
    return joined(*parts)


def fused(name: str, width: int) -> Shapes:
    both = {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
    return both | linear(f"{name}.out_proj", width, width)


def ideal(
    width: int = 1024,
    patch: int = 16,
    patches: int = 576,
    depth: int = 24,
    mlp: int = 4096,
    layers: int = 6,
    inner: int = 2048,
    codes: int = 16384,
    dim: int = 64,
    channels: int = 128,
    multiples: tuple[int, ...] = (1, 1, 2, 2, 4),
) -> Shapes:
    """As the released class saves it: below "model.", with two parts named a second time."""
    enc, dec = "encode_transformer", "decode_transformer"
    trunk, fusion = f"{enc}.backbone.model", f"{enc}.attn_fuse"
    parts = [{f"{trunk}.pos_embed": (1, patches, width)}, conv(f"{trunk}.patch_embed.proj", 3, width, patch)]
    for k in range(depth):
        block = f"{trunk}.blocks.{k}"
        parts += [norm(f"{block}.norm1", width), norm(f"{block}.norm2", width)]
        parts += [linear(f"{block}.attn.qkv", width, 3 * width), linear(f"{block}.attn.proj", width, width)]
        parts += [linear(f"{block}.mlp.fc1", width, mlp), linear(f"{block}.mlp.fc2", mlp, width)]
    pool = f"{trunk}.attn_pool"
    parts += [norm(f"{trunk}.norm", width), norm(f"{enc}.backbone.spatial_norm", width), norm(f"{pool}.norm", width)]
    parts += [
        {f"{pool}.latent": (1, 1, width)},
        linear(f"{pool}.q", width, width),
        linear(f"{pool}.kv", width, 2 * width),
    ]
    parts += [linear(f"{pool}.proj", width, width), linear(f"{pool}.mlp.fc1", width, mlp)]
    parts += [linear(f"{pool}.mlp.fc2", mlp, width)]
    parts += [norm(f"{fusion}.{name}_norm", width) for name in ("query", "kv", "ffn")] + [
        fused(f"{fusion}.attn", width)
    ]
    parts += [linear(f"{fusion}.ffn.0", width, 2 * width), linear(f"{fusion}.ffn.3", 2 * width, width)]
    for k in range(layers):
        block = f"{dec}.transformer.layers.{k}"
        parts += [norm(f"{block}.norm1", width), norm(f"{block}.norm2", width), fused(f"{block}.attn", width)]
        parts += [linear(f"{block}.ffn.net.0", width, inner), linear(f"{block}.ffn.net.3", inner, width)]
    tables = {"slot_position_embedding": patches, "cls_pos_embedding": 1, "cls_token": 1, "register_tokens": 4}
    parts += [{f"{dec}.{name}": (1, rows, width) for name, rows in tables.items()}, norm(f"{dec}.norm_post", width)]
    parts += [linear(f"{dec}.project_{name}", width, width) for name in ("semantic", "shallow")]
    inside = joined(*parts, quantizer(width, codes, dim), pixel_head(width, channels, multiples))
    again = {name: shape for name, shape in inside.items() if name.startswith("decoder.")}
    again |= {
        f"quantize.{name.removeprefix('slot_quantize.')}": s for name, s in inside.items() if "slot_quantize" in name
    }
    return {f"model.{name}": shape for name, shape in inside.items()} | again


def gpt(width: int, depth: int, inner: int, codes: int = 16384, classes: int = 1000) -> Shapes:
    parts = [{"cls_embedding.embedding_table.weight": (classes + 1, width), "tok_embeddings.weight": (codes, width)}]
    for k in range(depth):
        layer = f"layers.{k}"
        parts += [linear(f"{layer}.attention.wqkv", width, 3 * width, False)]
        parts += [linear(f"{layer}.attention.wo", width, width, False)]
        parts += [linear(f"{layer}.feed_forward.w{n}", width, inner, False) for n in (1, 3)]
        parts += [linear(f"{layer}.feed_forward.w2", inner, width, False)]
        parts += [{f"{layer}.attention_norm.weight": (width,), f"{layer}.ffn_norm.weight": (width,)}]
    return joined(*parts, {"norm.weight": (width,), "output.weight": (codes, width)})


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Weights that keep every activation near 1: scaled by the fan-in, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1 and "embed" not in name and "token" not in name and "slots_pos" not in name:
            values = values / torch.tensor(shape[1:]).prod() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.3 * values
        state[name] = values
    for name in state:
        if "spatial_norm" in name:
            state[name] = torch.full(shapes[name], float(name.endswith("weight")))
    for short, whole in (("decoder.", "model.decoder."), ("quantize.", "model.slot_quantize.")):
        for name in state:
            if name.startswith(short) and (full := whole + name.removeprefix(short)) in state:
                state[name] = state[full]
    return state


# ---- what the modules compute ----


class Plain:
    """Plain functions on the tensors of a state, in float64."""

    def __init__(self, state: State) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        x = x @ self[f"{name}.weight"].flatten(1).T
        return x + self[f"{name}.bias"] if f"{name}.bias" in self.state else x

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return standardized(x, eps) * self[f"{name}.weight"] + self[f"{name}.bias"]

    def conv(self, name: str, x: Tensor, **more: int) -> Tensor:
        return F.conv2d(x, self[f"{name}.weight"], self[f"{name}.bias"], **more)

    def group_norm(self, name: str, x: Tensor) -> Tensor:
        groups = standardized(x.reshape(len(x), 32, -1), 1e-6).view_as(x)
        return groups * self[f"{name}.weight"][:, None, None] + self[f"{name}.bias"][:, None, None]

    def residual(self, name: str, x: Tensor) -> Tensor:
        hidden = self.conv(f"{name}.conv1", swish(self.group_norm(f"{name}.norm1", x)), padding=1)
        hidden = self.conv(f"{name}.conv2", swish(self.group_norm(f"{name}.norm2", hidden)), padding=1)
        return hidden + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def spatial(self, name: str, x: Tensor) -> Tensor:
        tokens = self.group_norm(f"{name}.norm", x).flatten(2).transpose(1, 2)
        q, k, v = (self.linear(f"{name}.{part}", tokens) for part in "qkv")
        mixed = softmax_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.linear(f"{name}.proj_out", mixed).transpose(1, 2).view_as(x)

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.residual(f"{name}.mid.2", self.spatial(f"{name}.mid.1", self.residual(f"{name}.mid.0", x)))

    def levels(self, name: str, x: Tensor, levels: int, blocks: int) -> Tensor:
        for level in range(levels):
            place = f"{name}.conv_blocks.{level}"
            for k in range(blocks):
                x = self.residual(f"{place}.res.{k}", x)
                x = self.spatial(f"{place}.attn.{k}", x) if f"{place}.attn.{k}.q.weight" in self.state else x
            if level < levels - 1 and f"{place}.upsample.conv.weight" in self.state:
                x = self.conv(f"{place}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
            elif level < levels - 1:
                x = self.conv(f"{place}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv(f"{name}.conv_out", swish(self.group_norm(f"{name}.norm_out", x)), padding=1)

    def conv_decoder(self, x: Tensor, levels: int, blocks: int) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", x, padding=1))
        return self.levels("decoder", x, levels, blocks)

    def attention(self, name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """Eight heads, the projections apart ("q_proj") or in one tensor ("in_proj_weight")."""
        if f"{name}.in_proj_weight" in self.state:
            weights, biases = self[f"{name}.in_proj_weight"].chunk(3), self[f"{name}.in_proj_bias"].chunk(3)
            q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True))
        else:
            q, k, v = (self.linear(f"{name}.{part}_proj", x) for part, x in zip("qkv", (q, k, v), strict=True))
        return self.linear(f"{name}.out_proj", split_attention(q, k, v, 8, causal))

    def nearest(self, table: str, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and codes, both sides on the unit sphere."""
        rows = self[table] / self[table].norm(dim=1, keepdim=True)
        unit = latents / latents.norm(dim=-1, keepdim=True)
        ids = (unit[..., None, :] - rows).square().sum(-1).argmin(-1)
        return ids, rows[ids]


def standardized(x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v


def split_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return softmax_attention(q, k, v, causal).transpose(1, 2).flatten(2)
