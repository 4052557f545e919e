"""Text-only hosts: causal language models without a vision tower. With an image tokenizer they become a LLaVA."""

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from unimm.mllm.hosts.configs import shared_fields
from unimm.mllm.hosts.llava import UnimmLlavaConfig
from unimm.mllm.hosts.registry import ALL_PATCHES
from unimm.mllm.processing import UnimmProcessor
from unimm.tokenizer import ImageTokenizer

TEXT_HOSTS = ("llama", "qwen2", "qwen3")
"""Model types of the text-only language models that `attach` accepts."""


def is_text_only(model_type: str) -> bool:
    """Return whether a stock host of this model type is a language model alone."""
    return model_type in TEXT_HOSTS


def text_only_decoder(host: PreTrainedModel) -> PreTrainedModel:
    """Return the language model without its head."""
    return host.base_model


def text_only_config(
    host: PreTrainedModel, image_tokenizer: ImageTokenizer, processor: UnimmProcessor, rows: int
) -> UnimmLlavaConfig:
    """Build a LLaVA config around the host's config: features of the last layer, no CLS token to drop."""
    fields = shared_fields(host, image_tokenizer, processor, rows) | {
        "image_token_index": processor.image_token_id,
        **ALL_PATCHES,
        "tie_word_embeddings": host.config.tie_word_embeddings,
    }
    return UnimmLlavaConfig(**fields)


def text_only_model(config: PreTrainedConfig, decoder: dict[str, Tensor], **how: Any) -> tuple[Any, dict[str, Tensor]]:
    """Build a stock language model for `detach`.

    Args:
        config: its config.
        decoder: state dict of the language model without its head.
        how: `dtype` and other arguments of `from_config`.

    Returns:
        (the model with random weights, its state dict without the head).
    """
    model = AutoModelForCausalLM.from_config(config, **how)
    return model, {f"{model.base_model_prefix}.{name}": tensor for name, tensor in decoder.items()}
