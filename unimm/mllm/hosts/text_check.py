"""Check of a text-only host before anything is built: try its embedding, decoder, head and cache on a few tokens.

Hosts need no class each: what differs among families is the names of embedding and head, a bias of the head, and what
follows it (`heads`). A host that these do not explain to the last bit is refused by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from unimm.errors import UserError, one_line
from unimm.mllm.hosts.heads import finished_logits

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_TOKENS, _PADDING = 6, 2  # of the prompt that is tried; its second half is decoded token by token
_DRIFT = {torch.float32: 1e-3, torch.float64: 1e-9}  # of decoded logits, as a share of the largest; else 0.1


def check_text_host(host: PreTrainedModel) -> None:
    """Check that an image tokenizer can be attached to a text-only language model.

    Raises:
        UserError: its embedding or head cannot be found, its logits are not those of its head on its decoder's output,
            or its cache does not continue a padded prompt.
    """
    if why := _missing_part(host) or _other_behavior(host):
        raise UserError(f"The host is a {host.config.model_type} model, which cannot be attached: {why}.")


def _missing_part(host: PreTrainedModel) -> str:
    """Return which part is missing or of another kind; empty if none is."""
    config, embedding, head = host.config, host.get_input_embeddings(), host.get_output_embeddings()
    if config.is_encoder_decoder:
        return "it has an encoder, and one decoder must read texts and images"
    if config.get_text_config() is not config:
        return "it is multimodal, and none of the families whose vision tower can be replaced"
    if not isinstance(embedding, nn.Embedding) or all(part is not embedding for part in host.base_model.modules()):
        return "its input embedding cannot be found"
    if type(head) is not nn.Linear:
        return "its output head is no linear layer"
    width = embedding.weight.shape[1]
    if width != config.hidden_size:
        return f"its embedding is {width} wide and its decoder {config.hidden_size}"
    if not hasattr(config, "max_position_embeddings"):
        return "its config does not say how many tokens it reads (max_position_embeddings)"
    return ""


@torch.no_grad()
def _other_behavior(host: PreTrainedModel) -> str:
    """Return how the host differs from its embedding, decoder and head in a row; empty if it does not."""
    rows = host.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(_TOKENS, device=host.device) * 37 % rows)[None]
    with _evaluating(host):
        expected = host(input_ids=ids).logits
        try:
            found = _logits(host, ids)
            cache = DynamicCache(config=host.config)
            decoded = _decoded(host, ids, cache)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
        ) as error:
            return f"its decoder does not read embeddings, positions and a cache ({one_line(error)[:150].rstrip('.')})"
    exact = host.device.type == "cpu"  # on other devices two runs may differ in their last bits
    if not torch.allclose(found, expected, rtol=0, atol=0 if exact else 1e-2, equal_nan=True):
        apart = (found - expected).abs().max().item()
        return f"its logits are not those of its head on its decoder's output (up to {apart:.3g} apart)"
    if kinds := sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _LAYERS}):
        return f"its cache holds more than keys and values ({', '.join(kinds)})"
    drift, scale = (decoded - expected).abs().max().item(), expected.abs().max().item()
    if drift > _DRIFT.get(host.dtype, 0.1) * scale:
        return f"a padded prompt that is continued token by token has other logits (up to {drift:.3g} apart)"
    return ""


def _decoded(host: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Return the logits [1, L, V] of ids [1, L] padded on the left, their second half decoded token by token."""
    padded = torch.cat([ids[:, :1].expand(-1, _PADDING), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :_PADDING] = 0
    positions, total = (mask.cumsum(-1) - 1).clamp_min(0), _PADDING + _TOKENS
    bounds = [0, *range(total - _TOKENS // 2, total + 1)]
    steps = [
        _logits(
            host,
            padded[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    return torch.cat(steps, dim=1)[:, _PADDING:]


def _logits(host: PreTrainedModel, ids: Tensor, **how: Any) -> Tensor:
    """Return logits as a unified model computes them: embedding, decoder, head, and what follows it."""
    hidden = host.base_model(inputs_embeds=host.get_input_embeddings()(ids), **how).last_hidden_state
    return finished_logits(host.get_output_embeddings()(hidden), host.config)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
