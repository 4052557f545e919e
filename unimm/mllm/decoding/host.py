"""Decoding steps with the model's own forward, for every host.

R rows, T tokens so far, M image tokens, K codes.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from unimm.mllm.decoding.cache import RoomyLayer
from unimm.mllm.decoding.steps import Steps


class HostSteps(Steps):
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

    def logits(self, token_ids: Tensor, needed: int) -> Tensor:
        """See `Steps`."""
        begin, self.done = self.done, self.done + token_ids.shape[1]
        mask = self.mask[..., : self.length + self.done]
        if mask.ndim == 4:
            mask = causal(mask, token_ids.shape[1])
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


def causal(mask: Tensor, tokens: int) -> Tensor:
    """Expand an additive mask [R, 1, 1, T] to [R, 1, tokens, T], causal over the last `tokens` of T."""
    if tokens == 1:
        return mask
    later = torch.ones(tokens, mask.shape[-1], dtype=torch.bool, device=mask.device).triu(mask.shape[-1] - tokens + 1)
    return mask.masked_fill(later, torch.finfo(mask.dtype).min)
