"""Input embeddings and output heads of language models: where they are, and what follows a head."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def finished_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """Apply what a language model of this config does to the output of its head: a scale (Granite, Cohere), a soft cap
    (Gemma 2). The operations and their order are the models' own, so the bits are too."""
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def finishes_logits(config: PreTrainedConfig) -> bool:
    """Return whether `finished_logits` changes anything."""
    some = torch.linspace(-64, 64, 129)
    return not torch.equal(finished_logits(some, config), some)


def embedding_name(model: nn.Module) -> str:
    """Return the dotted name of a language model's input embedding ("embed_tokens", "wte", "decoder.embed_tokens")."""
    return _name_in(model, model.get_input_embeddings())


def head_name(model: nn.Module) -> str:
    """Return the dotted name of a language model's output head ("lm_head", "embed_out")."""
    return _name_in(model, model.get_output_embeddings())


def _name_in(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)
