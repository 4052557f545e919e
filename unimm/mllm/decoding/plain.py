"""Decoding steps on a CPU without the model's own modules: packed and fused matrix products.

R rows, n new tokens of each, H query heads, H' key heads, d head width, D hidden width, T tokens so far, M image
tokens, K codes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from unimm.mllm.decoding.cache import RoomyLayer
from unimm.mllm.decoding.host import causal
from unimm.mllm.decoding.known import is_known
from unimm.mllm.decoding.steps import Steps


def is_plain(model: Any) -> bool:
    """Return whether `PlainSteps` computes the same as the model's own forward."""
    on_cpu = model.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return on_cpu and is_known(model) and model.get_output_embeddings().weight.dtype == torch.float32


class _Product:
    """A linear layer, x @ weight.T + bias, with weights packed for few rows; a norm's scale can be folded in."""

    def __init__(self, linears: list[nn.Linear], rows: int, scale: Tensor | None = None) -> None:
        weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
        biases = [linear.bias for linear in linears]
        self.bias = torch.cat(biases) if all(bias is not None for bias in biases) else None
        if self.bias is None and any(bias is not None for bias in biases):
            raise AssertionError("some of the products have a bias")
        self.packed = _packed(weight if scale is None else weight * scale, rows)

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], "")

    def join(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        """Return the product added to `other`, or multiplied with it."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, how)


def _packed(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


class _PlainLayer:
    """One decoder layer: attention over the KV cache, then the gated MLP."""

    def __init__(self, layer: Any, rows: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        self.before, self.after = before.variance_epsilon, after.variance_epsilon
        self.heads = [p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj)]
        self.width = attention.head_dim
        self.qkv = _Product([attention.q_proj, attention.k_proj, attention.v_proj], rows, before.weight)
        self.out = _Product([attention.o_proj], rows)
        self.gate = _Product([mlp.gate_proj], rows, after.weight)
        self.up = _Product([mlp.up_proj], rows, after.weight)
        self.down = _Product([mlp.down_proj], rows)
        self.norm: Tensor | None = None
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm.weight] * self.heads[0] + [attention.k_norm.weight] * self.heads[1]
            self.norm, self.norm_eps = torch.stack(norms), attention.q_norm.variance_epsilon  # [H + H', d]

    def __call__(self, x: Tensor, n: int, cos: Tensor, sin: Tensor, layer: RoomyLayer, mask: Tensor | None) -> Tensor:
        """Return hidden states [R * n, D] for n tokens of each row."""
        rows, (heads, key_heads), d = len(x) // n, self.heads, self.width
        qkv = self.qkv(_normed(x, self.before)).view(rows * n, -1, d)  # [R * n, H + 2 H', d]
        qk = qkv[:, : heads + key_heads]
        if self.norm is not None:
            qk = _normed(qk, self.norm_eps) * self.norm
        qk = torch.addcmul(qk * cos, qk.roll(self.width // 2, -1), sin)
        new = (qk[:, heads:], qkv[:, heads + key_heads :])
        keys, values = layer.update(*(each.view(rows, n, key_heads, d).transpose(1, 2) for each in new))
        # grouped-query attention without repeating keys: fold the group and the tokens into [R, H', H / H' * n, d]
        queries = qk[:, :heads].view(rows, n, key_heads, -1, d).permute(0, 2, 3, 1, 4).reshape(rows, key_heads, -1, d)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        seen = seen.view(rows, key_heads, -1, n, d).permute(0, 3, 1, 2, 4).reshape(rows * n, -1)
        x = self.out.join(seen, x, "add")
        y = _normed(x, self.after)
        return self.down.join(self.up.join(y, self.gate(y, "swish"), "mul"), x, "add")


def _normed(x: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm over the last dimension, without a scale."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


class PlainSteps(Steps):
    """Decoding steps without the model's own modules, see `is_plain`."""

    def __init__(self, model: Any, cache: DynamicCache, mask: Tensor, positions: Tensor) -> None:
        text, rows = model.model.language_model, len(mask)
        self.cache, self.embeddings, self.done = cache, text.embed_tokens.weight, 0
        self.layers = [_PlainLayer(layer, rows) for layer in text.layers]
        self.queries = text.config.num_attention_heads // text.config.num_key_value_heads
        self.eps = text.norm.variance_epsilon
        vocabulary = model.visual_vocabulary
        head = model.get_output_embeddings().weight[vocabulary.base : vocabulary.end]
        self.head = _packed(head * text.norm.weight, rows)  # the final norm's scale is folded in
        cos, sin = text.rotary_emb(self.embeddings, positions)  # [R, M, d]
        half = cos.shape[-1] // 2  # the sign of rotate_half goes into sin, so that a roll is enough
        self.cos, self.sin = cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]
        self.length = mask.shape[1]
        self.mask: Tensor | None = None
        if not mask.all():
            seen = F.pad(mask.bool(), (0, positions.shape[-1]), value=True)
            self.mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None]  # [R, 1, 1, T + M]

    def logits(self, token_ids: Tensor, needed: int) -> Tensor:
        """See `Steps`."""
        rows, n = token_ids.shape
        x = F.embedding(token_ids.flatten(), self.embeddings)  # [R * n, D]
        begin, self.done = self.done, self.done + n
        cos, sin = (each[:, begin : self.done].flatten(0, 1) for each in (self.cos, self.sin))
        mask = None if self.mask is None else self.mask[..., : self.length + self.done]
        if n > 1:
            mask = x.new_zeros(1, 1, 1, self.length + self.done) if mask is None else mask
            mask = causal(mask, n).repeat(1, 1, self.queries, 1)
        for layer, kept in zip(self.layers, self.cache.layers, strict=True):
            x = layer(x, n, cos, sin, kept, mask)
        if needed < n:
            x = x.view(rows, n, -1)[:, n - needed :].flatten(0, 1)
        logits = torch.ops.mkldnn._linear_pointwise(_normed(x, self.eps), self.head, None, "none", [], "")
        return logits.view(rows, needed, -1)

    def forget(self, tokens: int) -> None:
        """See `Steps`."""
        self.done -= tokens
        for layer in self.cache.layers:
            layer.forget(tokens)

    def keep(self, rows: Tensor) -> None:
        """See `Steps`."""
        self.cache.batch_select_indices(rows)
        self.cos, self.sin = self.cos[rows], self.sin[rows]
        self.mask = None if self.mask is None else self.mask[rows]
