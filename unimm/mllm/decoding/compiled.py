"""Decoding steps with the model's own forward, compiled: a static cache, and every tensor written in place.

R rows, T tokens so far, M image tokens, K codes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from unimm.mllm.decoding.host import HostSteps

_SIZE_STEP = 64  # a static cache is rounded up to this: prompts of similar length share a compiled step


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
