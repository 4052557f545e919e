"""One decoding step of a known language model, for `torch.compile` on a GPU: fewer and larger kernels than its own.

The projections of queries, keys and values are one product, and so are the gate's and the up projection; keys and
values are not repeated for grouped queries, and attention is split over the tokens (flex attention). R rows, T tokens
of the cache, H query heads, H' key heads, d head width, D hidden width, K codes.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import StaticCache
from transformers.models.llama.modeling_llama import rotate_half

from unimm.mllm.decoding.known import is_known
from unimm.mllm.memory import free_bytes

_SHARE = 0.1  # of the free memory, that the joined weights may take
_BLOCK = 128  # tokens of the cache that flex attention reads at once


class _Joined:
    """Several linear layers as one product, with a copy of their weights."""

    def __init__(self, *linears: nn.Linear) -> None:
        self.linears = linears
        self.weight = torch.cat([linear.weight for linear in linears])
        self.bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])

    def refresh(self) -> None:
        """Copy the weights again, to the same memory."""
        torch.cat([linear.weight for linear in self.linears], out=self.weight)
        if self.bias is not None:
            torch.cat([linear.bias for linear in self.linears], out=self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class FusedLayers:
    """The layers of a known language model with joined weights, one for all steps of a model."""

    def __init__(self, model: Any) -> None:
        self.text, self.vocabulary = model.model.language_model, model.visual_vocabulary
        self.head = model.get_output_embeddings()
        layers = self.text.layers
        self.qkv = [_Joined(each.self_attn.q_proj, each.self_attn.k_proj, each.self_attn.v_proj) for each in layers]
        self.gate_up = [_Joined(each.mlp.gate_proj, each.mlp.up_proj) for each in layers]
        self.addresses = addresses(model)

    def refresh(self) -> None:
        """Copy the weights that are joined again: they may have changed in place."""
        for joined in (*self.qkv, *self.gate_up):
            joined.refresh()


_layers: "weakref.WeakKeyDictionary[Any, FusedLayers]" = weakref.WeakKeyDictionary()


def fused_layers(model: Any) -> FusedLayers | None:
    """Return a model's layers with joined weights, as they are now; None if its own forward is to be compiled."""
    kept = _layers.get(model)
    if kept is not None and kept.addresses == addresses(model) and is_known(model):
        kept.refresh()
        return kept
    _layers.pop(model, None)
    if is_fused(model):
        with torch.inference_mode(False), torch.no_grad():  # weights that can be written in any mode
            return _layers.setdefault(model, FusedLayers(model))
    return None


def is_fused(model: Any) -> bool:
    """Return whether `FusedForward` computes the same as the model's own forward, on a GPU with room for it."""
    if model.device.type != "cuda" or not is_known(model):
        return False
    config = model.model.language_model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    if groups & (groups - 1):  # flex attention splits the cache only if a group is a power of two
        return False
    parts = [part for each in model.model.language_model.layers for part in (each.self_attn, each.mlp)]
    return sum(weight.nbytes for part in parts for weight in part.parameters()) < _SHARE * free_bytes(model)


def addresses(model: Any) -> int:
    """Return a number that changes if a weight of the model moves."""
    return hash(tuple(each.data_ptr() for each in model.parameters()))


class FusedForward:
    """A model's forward of one token of each row, compiled; see `is_fused`.

    Args:
        length: T.
    """

    def __init__(self, layers: FusedLayers, length: int) -> None:
        self.layers, device = layers, layers.head.weight.device
        blocks = -(-length // _BLOCK)
        # flex attention reads the first `kv_num_blocks` of these; without a mask it would not split the cache
        self.blocks = BlockMask.from_kv_blocks(
            torch.zeros(1, 1, 1, dtype=torch.int32, device=device),
            torch.arange(blocks, dtype=torch.int32, device=device).view(1, 1, 1, blocks),
            BLOCK_SIZE=_BLOCK,
            seq_lengths=(1, length),
        )
        self.compiled = torch.compile(_logits, dynamic=False, fullgraph=True)

    def __call__(self, static: StaticCache, hidden: Tensor, place: Tensor, token_ids: Tensor, at: Tensor) -> Tensor:
        """Feed one token of each row, token_ids [R, 1] at positions [R, 1]; return the logits [R, 1, K] after it.

        Args:
            hidden: [R, T], true for the tokens of the cache that are masked; the place of the new one is opened.
            place: [1], where its keys and values go; moves on by one.
        """
        hidden.index_fill_(1, place, False)
        self.blocks.kv_num_blocks.copy_((place // _BLOCK + 1).view(1, 1, 1))
        dtype = self.layers.head.weight.dtype
        # an input of what is compiled: flex attention on a CPU cannot capture a tensor that is computed there
        bias = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        logits: Tensor = self.compiled(self.layers, static, bias, self.blocks, place, token_ids, at)
        place.add_(1)
        return logits


def _logits(
    fused: FusedLayers,
    static: StaticCache,
    bias: Tensor,
    blocks: BlockMask,
    place: Tensor,
    token_ids: Tensor,
    at: Tensor,
) -> Tensor:
    """Return what `FusedForward` does, with bias [R, T] on the scores of attention, and the blocks that it reads."""
    x = F.embedding(token_ids[:, 0], fused.text.embed_tokens.weight)  # [R, D]
    cos, sin = (each[:, None] for each in fused.text.rotary_emb(x, at))  # [R, 1, 1, d]
    for number, layer in enumerate(fused.text.layers):
        attention, kept = layer.self_attn, static.layers[number]
        qkv = fused.qkv[number](layer.input_layernorm(x)).unflatten(1, (-1, 1, attention.head_dim))
        key_heads = attention.k_proj.out_features // attention.head_dim
        queries, keys, values = qkv.split((qkv.shape[1] - 2 * key_heads, key_heads, key_heads), dim=1)  # [R, H, 1, d]
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        queries, keys = (each * cos + rotate_half(each) * sin for each in (queries, keys))
        kept.keys.index_copy_(2, place, keys)
        kept.values.index_copy_(2, place, values)
        seen = flex_attention(
            queries,
            kept.keys,
            kept.values,
            score_mod=lambda score, row, head, query, token: score + bias[row, token],
            block_mask=blocks,
            enable_gqa=True,
        )
        x = x + attention.o_proj(seen[:, :, 0].flatten(1))
        gate, up = fused.gate_up[number](layer.post_attention_layernorm(x)).chunk(2, dim=-1)
        x = x + layer.mlp.down_proj(F.silu(gate) * up)
    weight = fused.head.weight[fused.vocabulary.base : fused.vocabulary.end]
    return F.linear(fused.text.norm(x), weight)[:, None]
