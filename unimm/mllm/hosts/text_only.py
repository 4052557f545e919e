"""Text-only hosts: causal language models without a vision tower. With an image tokenizer they become a LLaVA.

Whatever `AutoModelForCausalLM` builds is accepted if `text_check` finds its parts; no family has a class of its own.
"""

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from unimm.mllm.hosts.configs import shared_fields
from unimm.mllm.hosts.heads import finishes_logits
from unimm.mllm.hosts.llava import UnimmLlavaConfig
from unimm.mllm.hosts.registry import ALL_PATCHES, HOSTS
from unimm.mllm.processing import UnimmProcessor
from unimm.tokenizer import ImageTokenizer

TEXT_HOSTS = (
    *("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite"),
    *("cohere", "gpt2", "gpt_neox", "opt", "falcon", "smollm3", "qwen3_moe"),
)
"""Model types of text-only hosts that `eval/hosts.py` tries; others are accepted too, if `check_text_host` says so."""


def is_text_only(model_type: str) -> bool:
    """Return whether a stock host of this model type is a language model alone."""
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in HOSTS


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
        "head_bias": host.get_output_embeddings().bias is not None,
        "finishes_logits": finishes_logits(host.config),
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
