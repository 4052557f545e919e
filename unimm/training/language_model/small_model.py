"""Small language models trained from scratch, in Qwen3's architecture (https://arxiv.org/abs/2505.09388)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from unimm.errors import UserError

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
"""Special tokens of a newly trained text tokenizer: ChatML's turns and the image markers."""


def new_language_model(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a randomly initialized Qwen3 with the given fields of Qwen3Config; vocabulary size and special token ids
    come from the tokenizer.

    Raises:
        UserError: an unknown field (a transformers config would silently accept it), or one that the tokenizer decides.
    """
    known = {field.name for field in dataclasses.fields(Qwen3Config)}
    if unknown := sorted(fields.keys() - known):
        raise UserError(
            f"model.llm has the unknown field {unknown[0]!r}; Qwen3Config knows {', '.join(sorted(known))}."
        )
    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if decided := sorted(fields.keys() & ids.keys()):
        raise UserError(f"model.llm may not set {decided[0]!r}: the text tokenizer decides it.")
    return Qwen3ForCausalLM(Qwen3Config(**fields, **ids))
