"""Decoding steps of image generation: one forward for all rows, with a preallocated KV cache that is written in place.

Two decoders return the same logits. `HostSteps` calls the model's own forward and works with every host (the language
or multimodal model that the image tokenizer is attached to). `PlainSteps` runs the weights of a Llama, Qwen2 or Qwen3
on a CPU in float32, with packed and fused matrix products that are two to five times as fast as the model's own for
few rows; anything it does not support falls back to `HostSteps`. R rows, H query heads, H' key heads, d head width,
D hidden width, T tokens so far, K codes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, StaticCache
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

_PARTS = ("DecoderLayer", "Attention", "MLP", "RMSNorm")
_KNOWN = {
    getattr(module, f"{name}Model"): tuple(getattr(module, name + part) for part in _PARTS)
    for module, name in ((modeling_llama, "Llama"), (modeling_qwen2, "Qwen2"), (modeling_qwen3, "Qwen3"))
}
_SIZE_STEP = 64  # a static cache is rounded up to this: prompts of similar length share a compiled step
_STILL_ROPES = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the sequence length


class Steps(Protocol):
    """A decoder of image tokens for a batch of rows, after the prompt."""

    cache: Cache

    @property
    def takes_many(self) -> bool:
        """Return whether several tokens can be fed at once."""

    def logits(self, token_ids: Tensor, needed: int) -> Tensor:
        """Feed the next n image tokens of each row, token_ids [R, n]; return the logits [R, needed, K] after the last
        `needed` of them."""

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows [R'] only."""

    def forget(self, tokens: int) -> None:
        """Remove the last `tokens` tokens."""


class RoomyLayer(DynamicLayer):
    """A KV cache layer preallocated for `room` more tokens, which are written in place without a copy."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.length = keys.shape[2]
        self.all_keys, self.all_values = (F.pad(each, (0, 0, 0, room)) for each in (keys, values))
        self.show()

    def show(self) -> None:
        """Point `keys` and `values` to the filled part of the buffers."""
        self.keys, self.values = self.all_keys[:, :, : self.length], self.all_values[:, :, : self.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [R, H', n, d]; return all of them."""
        end = self.length + key_states.shape[2]
        self.all_keys[:, :, self.length : end] = key_states
        self.all_values[:, :, self.length : end] = value_states
        self.length = end
        self.show()
        return self.keys, self.values

    def forget(self, tokens: int) -> None:
        """Remove the last `tokens` tokens."""
        self.length -= tokens
        self.show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Continue with these rows only."""
        indices = indices.to(self.all_keys.device)  # layers may be on different devices
        self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]
        self.show()


def expand_cache(cache: DynamicCache, rows: Tensor, room: int) -> None:
    """Expand the cache of prompts to sequences: row n continues prompt `rows[n]`, with room for the image."""
    for number, layer in enumerate(cache.layers):
        rows = rows.to(layer.keys.device)
        if type(layer) is DynamicLayer:
            cache.layers[number] = RoomyLayer(layer.keys[rows], layer.values[rows], room)
        else:  # a sliding window has a fixed size and needs no more room
            layer.batch_select_indices(rows)


def steps_after(
    model: Any, cache: DynamicCache, mask: Tensor, positions: Tensor, compiled: bool, on_fallback: Callable[[str], None]
) -> Steps:
    """Return the fastest decoder for this model.

    Args:
        cache: cache of the prompts, see `expand_cache`.
        mask: attention mask [R, T] of the prompts.
        positions: positions of the image tokens, [R, M], or [3, R, M] for M-RoPE.
        compiled: whether to compile a step.
        on_fallback: called with the reason if a step cannot be compiled.
    """
    if compiled:
        if any(type(layer) is not RoomyLayer for layer in cache.layers):
            on_fallback("not compiled, this host's cache has layers of another kind than full attention")
        else:
            return CompiledSteps(model, cache, mask, positions, on_fallback)
    if _is_plain(model):
        return PlainSteps(model, cache, mask, positions)
    return HostSteps(model, cache, mask, positions)


class HostSteps:
    """Decoding steps with the model's own forward."""

    def __init__(self, model: Any, cache: Cache, mask: Tensor, positions: Tensor) -> None:
        self.model, self.cache, self.positions = model, cache, positions
        self.length, self.done = mask.shape[1], 0
        room = mask.new_ones(len(mask), positions.shape[-1])
        self.mask = torch.cat([mask, room], dim=1)  # [R, T + M]
        config = model.config.get_text_config()
        full = all(type(layer) is RoomyLayer for layer in cache.layers)
        if full and config._attn_implementation in ("sdpa", "eager"):  # build the 4D mask once, not in every step
            lowest = torch.finfo(model.dtype).min
            hidden = torch.zeros_like(self.mask, dtype=model.dtype).masked_fill(self.mask == 0, lowest)
            self.mask = hidden[:, None, None]  # [R, 1, 1, T + M]

    @property
    def takes_many(self) -> bool:
        """See `Steps`."""
        return True

    def logits(self, token_ids: Tensor, needed: int) -> Tensor:
        """See `Steps`."""
        begin, self.done = self.done, self.done + token_ids.shape[1]
        mask = self.mask[..., : self.length + self.done]
        if mask.ndim == 4:
            mask = _causal(mask, token_ids.shape[1])
        output = self.model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=self.positions[..., begin : self.done],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=needed,
            vocabulary="image",
        )
        logits: Tensor = output.logits
        return logits

    def keep(self, rows: Tensor) -> None:
        """See `Steps`."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[..., rows, :]

    def forget(self, tokens: int) -> None:
        """See `Steps`; works only if every cache layer is a `RoomyLayer`."""
        self.done -= tokens
        for layer in self.cache.layers:
            layer.forget(tokens)


def _causal(mask: Tensor, tokens: int) -> Tensor:
    """Expand an additive mask [R, 1, 1, T] to [R, 1, tokens, T], causal over the last `tokens` of T."""
    if tokens == 1:
        return mask
    later = torch.ones(tokens, mask.shape[-1], dtype=torch.bool, device=mask.device).triu(mask.shape[-1] - tokens + 1)
    return mask.masked_fill(later, torch.finfo(mask.dtype).min)


class CompiledSteps(HostSteps):
    """Decoding steps with the model's own forward, compiled once: static cache, every tensor written in place."""

    def __init__(
        self, model: Any, cache: DynamicCache, mask: Tensor, positions: Tensor, on_fallback: Callable[[str], None]
    ) -> None:
        super().__init__(model, cache, mask, positions)
        self.on_fallback: Callable[[str], None] | None = on_fallback
        self.prompt_mask, self.begun = mask, False

    @property
    def takes_many(self) -> bool:
        """Return whether several tokens can be fed at once: only before the first compiled step."""
        return not self.begun

    def _begin(self) -> None:
        """Copy the cache to a static one and compile for its size."""
        mask, self.begun = self.prompt_mask, True
        total = self.positions.shape[-1] - self.done + self.cache.get_seq_length()
        total = -(-total // _SIZE_STEP) * _SIZE_STEP
        static = StaticCache(config=self.model.config.get_text_config(), max_cache_len=total)
        for number, layer in enumerate(self.cache.layers):
            static.update(layer.keys, layer.values, number)
        self.static, self.cuda = static, self.positions.device.type == "cuda"
        self.hidden = torch.ones(len(mask), total, dtype=torch.bool, device=mask.device)
        self.hidden[:, : mask.shape[1]] = mask == 0
        self.hidden[:, mask.shape[1] : self.cache.get_seq_length()] = False
        self.place = torch.tensor([self.cache.get_seq_length()], device=mask.device)
        mode = "reduce-overhead" if self.cuda else None
        self.compiled = torch.compile(self._step, mode=mode, dynamic=False)

    def _step(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        self.hidden.index_fill_(1, self.place, False)
        self.place.add_(1)
        lowest = torch.finfo(self.model.dtype).min
        hidden = torch.zeros_like(self.hidden, dtype=self.model.dtype).masked_fill(self.hidden, lowest)
        output = self.model(
            input_ids=token_ids,
            attention_mask=hidden[:, None, None],
            position_ids=position_ids,
            past_key_values=self.static,
            use_cache=True,
            vocabulary="image",
        )
        logits: Tensor = output.logits
        return logits

    def logits(self, token_ids: Tensor, needed: int) -> Tensor:
        """See `Steps`; after the first compiled step it takes one token at a time."""
        if self.on_fallback is None or token_ids.shape[1] > 1:
            return super().logits(token_ids, needed)
        first = not self.begun
        if first:
            self._begin()
        positions = self.positions[..., self.done : self.done + 1].contiguous()
        if self.cuda:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            logits = self.compiled(token_ids, positions)
        except Exception as error:  # a compiler can raise anything; only the first step can still fall back
            if not first:
                raise
            self.on_fallback(f"not compiled, {type(error).__name__}: {error}".splitlines()[0])
            self.on_fallback, self.begun = None, False
            return super().logits(token_ids, needed)
        self.done += 1
        return logits.clone() if self.cuda else logits  # a CUDA graph reuses its output memory

    def keep(self, rows: Tensor) -> None:
        """See `Steps`; the step is recompiled for the new batch size."""
        if not self.begun:
            self.prompt_mask = self.prompt_mask[rows]
            return super().keep(rows)
        for layer in self.static.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.hidden, self.positions = self.hidden[rows], self.positions[..., rows, :]
        self.compiled = torch.compile(self._step, mode="reduce-overhead" if self.cuda else None, dynamic=False)
        return None


def _is_plain(model: Any) -> bool:
    """Return whether `PlainSteps` computes the same as the model's own forward."""
    text = model.model.language_model
    if type(text) not in _KNOWN or model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    config, head = text.config, model.get_output_embeddings()
    norm_class = _KNOWN[type(text)][-1]
    known = {*_KNOWN[type(text)], nn.Linear, type(ACT2FN["silu"])}  # adapter modules have other types
    parts = [model, model.model, head, *text.modules()]
    rope = config.rope_parameters or {}
    return bool(
        config._attn_implementation in ("sdpa", "eager")
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _STILL_ROPES
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and type(text.embed_tokens) is nn.Embedding
        and type(head) is nn.Linear
        and head.bias is None
        and type(text.norm) is norm_class
        and all({type(part) for part in layer.modules()} <= known for layer in text.layers)
        and all(layer.self_attn.scaling == layer.self_attn.head_dim**-0.5 for layer in text.layers)
        and not any(_is_changed(part) for part in parts)
        and all(p.dtype == torch.float32 and not p.is_meta for p in (*text.parameters(), head.weight))
    )


def _is_changed(part: nn.Module) -> bool:
    """Return whether this module has hooks, or a replaced forward or parametrized weights."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks) or "forward" in vars(part) or hasattr(part, "_hf_hook") or hasattr(part, "parametrizations")


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


class PlainSteps:
    """Decoding steps without the model's own modules, see `_is_plain`."""

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

    @property
    def takes_many(self) -> bool:
        """See `Steps`."""
        return True

    def logits(self, token_ids: Tensor, needed: int) -> Tensor:
        """See `Steps`."""
        rows, n = token_ids.shape
        x = F.embedding(token_ids.flatten(), self.embeddings)  # [R * n, D]
        begin, self.done = self.done, self.done + n
        cos, sin = (each[:, begin : self.done].flatten(0, 1) for each in (self.cos, self.sin))
        mask = None if self.mask is None else self.mask[..., : self.length + self.done]
        if n > 1:
            mask = x.new_zeros(1, 1, 1, self.length + self.done) if mask is None else mask
            mask = _causal(mask, n).repeat(1, 1, self.queries, 1)
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
