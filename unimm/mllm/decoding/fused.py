"""One decoding step of a known language model, for `torch.compile` on a GPU: fewer and larger kernels than its own.

The projections of queries, keys and values are one product, and so are the gate's and the up projection; keys and
values are not repeated for grouped queries, and attention is split over the tokens (flex attention). R rows, T tokens
of the cache, H query heads, H' key heads, d head width, D hidden width, K codes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import StaticCache

from unimm.mllm.decoding.known import is_known
from unimm.mllm.memory import free_bytes

_SHARE = 0.1  # of the free memory, that the joined weights may take


def is_fused(model: Any) -> bool:
    """Return whether `FusedForward` computes the same as the model's own forward, on a GPU with room for it."""
    if model.device.type != "cuda" or not is_known(model):
        return False
    joined = [part.weight for layer in model.model.language_model.layers for part in (*_qkv(layer), *_gate_up(layer))]
    return sum(weight.nbytes for weight in joined) < _SHARE * free_bytes(model)


def _qkv(layer: Any) -> list[nn.Linear]:
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def _gate_up(layer: Any) -> list[nn.Linear]:
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


class _Joined:
    """Several linear layers as one product, with a copy of their weights."""

    def __init__(self, linears: list[nn.Linear]) -> None:
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


class FusedForward:
    """A model's forward of one token of each row, compiled; see `is_fused`."""

    def __init__(self, model: Any) -> None:
        self.text, self.vocabulary = model.model.language_model, model.visual_vocabulary
        self.head = model.get_output_embeddings()
        self.qkv = [_Joined(_qkv(layer)) for layer in self.text.layers]
        self.gate_up = [_Joined(_gate_up(layer)) for layer in self.text.layers]
        self.compiled = torch.compile(_logits, dynamic=False, fullgraph=True)

    def refresh(self) -> None:
        """Copy the weights that are joined again: they may have changed in place."""
        for joined in (*self.qkv, *self.gate_up):
            joined.refresh()

    def __call__(self, static: StaticCache, hidden: Tensor, place: Tensor, token_ids: Tensor, at: Tensor) -> Tensor:
        """Feed one token of each row, token_ids [R, 1] at positions [R, 1]; return the logits [R, 1, K] after it.

        Args:
            hidden: [R, T], true for the tokens of the cache that are masked; the place of the new one is opened.
            place: [1], where its keys and values go; moves on by one.
        """
        hidden.index_fill_(1, place, False)
        dtype = self.head.weight.dtype
        # an input of what is compiled: flex attention on a CPU cannot capture a tensor that is computed there
        bias = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        logits: Tensor = self.compiled(self, static, bias, place, token_ids, at)
        place.add_(1)
        return logits


def _logits(
    fused: FusedForward, static: StaticCache, bias: Tensor, place: Tensor, token_ids: Tensor, at: Tensor
) -> Tensor:
    """Return what `FusedForward` does, with bias [R, T] on the scores of attention."""
    x = F.embedding(token_ids[:, 0], fused.text.embed_tokens.weight)  # [R, D]
    cos, sin = (each[:, None] for each in fused.text.rotary_emb(x, at))  # [R, 1, 1, d]
    for number, layer in enumerate(fused.text.layers):
        attention, kept = layer.self_attn, static.layers[number]
        qkv = fused.qkv[number](layer.input_layernorm(x)).unflatten(1, (-1, 1, attention.head_dim))
        key_heads = attention.k_proj.out_features // attention.head_dim
        queries, keys, values = qkv.split((qkv.shape[1] - 2 * key_heads, key_heads, key_heads), dim=1)  # [R, H, 1, d]
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        queries, keys = (each * cos + _rotated(each) * sin for each in (queries, keys))
        kept.keys.index_copy_(2, place, keys)
        kept.values.index_copy_(2, place, values)
        seen = flex_attention(
            queries,
            kept.keys,
            kept.values,
            score_mod=lambda score, row, head, query, token: score + bias[row, token],
            enable_gqa=True,
        )
        x = x + attention.o_proj(seen[:, :, 0].flatten(1))
        gate, up = fused.gate_up[number](layer.post_attention_layernorm(x)).chunk(2, dim=-1)
        x = x + layer.mlp.down_proj(F.silu(gate) * up)
    weight = fused.head.weight[fused.vocabulary.base : fused.vocabulary.end]
    return F.linear(fused.text.norm(x), weight)[:, None]


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
