"""Reading the prompts of a drawing into the KV cache: each distinct one once, with little padding.

Tokens that all prompts begin with (a system turn, the head of the chat template) are read once, in one row; the rest is
read in groups of like length. P prompts, L tokens, C common ones, M image tokens, K codes.
"""

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_FORWARD = 64
"""How many tokens another forward has to save: reading the weights once takes about as long."""


@dataclass(frozen=True)
class Prompts:
    """Prompts: token_ids [P, L], mask [P, L], and for each prompt the numbers of its images, in order.

    They are padded on the left; those that were read can have masked cells behind their common tokens, too.
    """

    token_ids: Tensor
    mask: Tensor
    images: list[list[int]]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def starts(self) -> Tensor:
        """Return the place of each prompt's first token, [P]."""
        return self.mask.argmax(1)

    def rows(self, chosen: Sequence[int]) -> "Prompts":
        """Return these prompts."""
        index = torch.tensor(list(chosen), dtype=torch.long, device=self.token_ids.device)
        return Prompts(self.token_ids[index], self.mask[index], [self.images[n] for n in chosen])

    def distinct(self, keys: Sequence[Hashable]) -> tuple["Prompts", Tensor]:
        """Return the first prompt of each key, and for every prompt [P] which of those it equals."""
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        chosen = sorted(first.values())
        places = [chosen.index(first[key]) for key in keys]
        return self.rows(chosen), torch.tensor(places, device=self.token_ids.device)


def stacked(sides: Sequence[Prompts], pad: int) -> Prompts:
    """Concatenate prompts, padded on the left with a masked id `pad`, which must not be the image placeholder."""
    length = max(side.token_ids.shape[1] for side in sides)
    token_ids = torch.cat([_left_pad(side.token_ids, length, pad) for side in sides])
    mask = torch.cat([_left_pad(side.mask, length, 0) for side in sides])
    return Prompts(token_ids, mask, [row for side in sides for row in side.images])


def read_prompts(model: Any, prompts: Prompts, pixel_values: Tensor | None) -> tuple[Tensor, DynamicCache, Prompts]:
    """Read every prompt once.

    Args:
        pixel_values: [I, 3, H, W], which the prompts' image numbers count.

    Returns:
        The logits [P, K] after each prompt, the cache, and the prompts as they lie in it.
    """
    config = model.config.get_text_config()
    begun = DynamicCache(config=config)
    # masked cells between tokens would count in a sliding window, and flash attention takes none
    full = all(type(layer) is DynamicLayer for layer in begun.layers)
    common, groups = 0, [list(range(len(prompts)))]
    if full and config._attn_implementation in ("sdpa", "eager"):
        common, groups = _plan(prompts, model.config.image_token_id)
    features = _image_features(model, pixel_values, prompts)
    if common:
        start = int(prompts.starts[0])
        head = prompts.token_ids[:1, start : start + common]
        _read(model, Prompts(head, torch.ones_like(head), [[]]), 0, begun, {})
    parts = []
    for group in groups:
        rows = _laid_out(prompts.rows(group), common)
        cache = _repeated(begun, len(group)) if common else DynamicCache(config=config)
        parts.append((_read(model, rows, common, cache, features(rows)), cache, rows))
    return parts[0] if len(groups) == 1 else _joined(parts, groups, model.config.boi_token_id)


def _plan(prompts: Prompts, image_token_id: int) -> tuple[int, list[list[int]]]:
    """Return how many common tokens to read first, and the groups of prompts to read together after them: what takes
    the fewest tokens, counting `_FORWARD` more for each forward."""
    lengths = (prompts.token_ids.shape[1] - prompts.starts).tolist()
    common = _common_tokens(prompts, lengths, image_token_id)
    plain, shared = _grouped(lengths), _grouped([length - common for length in lengths])
    if len(lengths) == 1 or common + _FORWARD + shared[0] >= plain[0]:
        return 0, plain[1]
    return common, shared[1]


def _common_tokens(prompts: Prompts, lengths: list[int], image_token_id: int) -> int:
    """Return how many tokens all prompts begin with, without images; each keeps one token at least."""
    limit = min(lengths) - 1
    index = prompts.starts[:, None] + torch.arange(limit, device=prompts.mask.device)
    heads, mask = prompts.token_ids.gather(1, index), prompts.mask.gather(1, index)
    same = ((heads == heads[:1]) & (heads != image_token_id) & (mask > 0)).all(0)
    return int(same.long().cumprod(0).sum())


def _grouped(lengths: list[int]) -> tuple[int, list[list[int]]]:
    """Return the least cost of reading prompts of these lengths in groups, each padded to its longest, and the groups,
    by dynamic programming over the prompts sorted by length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n prompts, and where their last group begins
    for n in range(1, len(order) + 1):
        longest = lengths[order[n - 1]]
        best.append(min((best[k][0] + _FORWARD + (n - k) * longest, k) for k in range(n)))
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[best[end][1] : end]))
        end = best[end][1]
    return best[-1][0], groups


def _laid_out(prompts: Prompts, common: int) -> Prompts:
    """Return prompts without superfluous padding: the common tokens, masked cells, the rest of each prompt."""
    starts, length = prompts.starts, prompts.token_ids.shape[1]
    if not common:
        first = int(starts.min())
        return Prompts(prompts.token_ids[:, first:], prompts.mask[:, first:], prompts.images)
    rest = int(starts.min()) + common
    head = prompts.token_ids[:, :common].clone()
    for row, start in enumerate(starts.tolist()):
        head[row] = prompts.token_ids[row, start : start + common]
    behind = torch.arange(rest, length, device=starts.device) >= starts[:, None] + common
    token_ids = torch.cat([head, prompts.token_ids[:, rest:]], dim=1)
    mask = torch.cat([torch.ones_like(head), prompts.mask[:, rest:] * behind], dim=1)
    return Prompts(token_ids, mask, prompts.images)


def _read(model: Any, rows: Prompts, done: int, cache: DynamicCache, images: dict[str, Any]) -> Tensor:
    """Feed prompts to the cache, which holds their first `done` tokens; return the logits [P, K] after them."""
    positions = model.token_positions(rows.token_ids, rows.mask)
    output = model(
        input_ids=rows.token_ids[:, done:],
        attention_mask=rows.mask,
        position_ids=positions[..., done:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        vocabulary="image",
        **images,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _image_features(model: Any, pixel_values: Tensor | None, prompts: Prompts) -> Callable[[Prompts], dict[str, Any]]:
    """Encode the images of the prompts, each once; return a function to the arguments of a forward for some prompts."""
    used = sorted({number for row in prompts.images for number in row})
    if pixel_values is None or not used:
        return lambda rows: {}
    encoded = model.get_image_features(pixel_values[used].to(model.device, model.dtype), return_dict=True)

    def features(rows: Prompts) -> dict[str, Any]:
        places = [used.index(number) for row in rows.images for number in row]
        if not places:
            return {}
        pooled, chosen = encoded.pooler_output, copy(encoded)
        chosen.pooler_output = pooled[places] if isinstance(pooled, Tensor) else [pooled[place] for place in places]
        return {"mm_encoder_outputs": {"image": chosen}}

    return features


def _repeated(cache: DynamicCache, count: int) -> DynamicCache:
    """Return a cache of `count` rows, each a copy of the only row of `cache`."""
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    return DynamicCache([tuple(each.expand(count, -1, -1, -1) for each in pair) for pair in pairs])


def _joined(
    parts: Sequence[tuple[Tensor, DynamicCache, Prompts]], groups: list[list[int]], pad: int
) -> tuple[Tensor, DynamicCache, Prompts]:
    """Join what was read in groups, in the order of the prompts; shorter groups are padded on the left."""
    rows = stacked([part[2] for part in parts], pad)
    order = torch.tensor([n for group in groups for n in group]).argsort()
    length = rows.token_ids.shape[1]

    def whole(caches: Sequence[Tensor]) -> Tensor:
        """Join keys or values [g, H', T, d] of the groups."""
        padded = [F.pad(each, (0, 0, length - each.shape[2], 0)) for each in caches]
        return torch.cat(padded)[order.to(padded[0].device)]

    layers = zip(*(part[1].layers for part in parts), strict=True)
    cache = DynamicCache([(whole([x.keys for x in each]), whole([x.values for x in each])) for each in layers])
    logits = torch.cat([part[0] for part in parts])
    return logits[order.to(logits.device)], cache, rows.rows(order.tolist())


def _left_pad(rows: Tensor, length: int, value: int) -> Tensor:
    return F.pad(rows, (length - rows.shape[1], 0), value=value)
