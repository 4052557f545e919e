"""The KV cache of a drawing: preallocated for the whole image, and written in place.

R rows, H' key heads, n new tokens, d head width.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


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
