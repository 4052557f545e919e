"""Decoding steps of image generation: one forward for all rows, with a preallocated KV cache that is written in place.

All decoders return the same logits. `HostSteps` calls the model's own forward and works with every host (the language
or multimodal model that the image tokenizer is attached to). `PlainSteps` runs the weights of a Llama, Qwen2 or Qwen3
on a CPU in float32, with packed and fused matrix products that are two to five times as fast as the model's own for
few rows; anything it does not support falls back to `HostSteps`. `CompiledSteps` is `HostSteps` under `torch.compile`.
R rows, T tokens so far, M image tokens, K codes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from unimm.mllm.decoding.cache import RoomyLayer, expand_cache
from unimm.mllm.decoding.compiled import CompiledSteps
from unimm.mllm.decoding.host import HostSteps
from unimm.mllm.decoding.plain import PlainSteps, is_plain
from unimm.mllm.decoding.steps import Steps

__all__ = ["CompiledSteps", "HostSteps", "PlainSteps", "RoomyLayer", "Steps", "expand_cache", "is_plain", "steps_after"]


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
    if is_plain(model):
        return PlainSteps(model, cache, mask, positions)
    return HostSteps(model, cache, mask, positions)
