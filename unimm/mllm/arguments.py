"""Arguments of `generate`: which of transformers' are supported in image mode and in text mode, and why others are not.

docs/attach.md has the same as a table; a test compares the two and runs every row.
"""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from unimm.errors import UserError
from unimm.sampling import SAMPLING_NAMES

_REASONS: dict[str, tuple[str, ...]] = {
    "an image is one sequence, drawn id by id; num_return_sequences draws several": (
        *("num_beams", "early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints"),
        *("force_words_ids", "penalty_alpha", "dola_layers", "low_memory"),
    ),
    "an image always has as many ids as its grid": (
        *("max_time", "stop_strings", "stopping_criteria", "forced_bos_token_id", "forced_eos_token_id"),
        "exponential_decay_length_penalty",
    ),
    "image ids are chosen by guidance_scale, temperature, top_k, top_p and min_p alone": (
        *("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
        *("begin_suppress_tokens", "sequence_bias", "renormalize_logits", "remove_invalid_values", "token_healing"),
        *("watermarking_config", "logits_processor", "prefix_allowed_tokens_fn"),
    ),
    "no second model drafts image ids": (
        *("assistant_model", "assistant_tokenizer", "is_assistant", "use_mtp", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
        *("assistant_ensemble_weight", "speculation_type"),
    ),
    "drawing makes a cache of its own, as large as prompt and image": (
        *("cache_implementation", "cache_config", "max_cache_len", "past_key_values", "prefill_chunk_size"),
        "compile_config",
    ),
    "a prompt is token ids and attention_mask, from which the rest follows": (
        *("inputs_embeds", "position_ids", "decoder_start_token_id", "mm_encoder_outputs", "image_sizes"),
    ),
    "image mode has its own loop, which keeps no hidden states": (
        *("custom_generate", "output_attentions", "output_hidden_states"),
    ),
}
IMAGE_MODE_REFUSES = {name: reason for reason, names in _REASONS.items() for name in names}
"""Argument -> why image mode rejects it. None, False and the neutral values of transformers are accepted."""

IMAGE_MODE_IGNORES = frozenset(
    (
        *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "use_cache", "synced_gpus", "tokenizer"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "disable_compile", "trust_remote_code"),
    )
)
"""Arguments that do not affect images and are ignored, so that callers can share arguments between both modes."""

TEXT_MODE_REFUSES = {
    "assistant_early_exit": "early exit needs a model that is a language model and nothing else: give assistant_model",
    **dict.fromkeys(("guidance_interval", "guidance_schedule", "compile"), "it belongs to drawing"),
    "cache_implementation": 'continuous batching ("paged") would choose among rows that stand for no text',
}

_OUTPUTS = ("num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits")
_NEUTRAL = GenerationConfig._get_default_generation_params()
_NEUTRAL |= {"encoder_repetition_penalty": 1.0, "typical_p": 1.0}
_OWN_CACHES = ("dynamic", "static")  # both return the same ids as image mode's own cache


def image_mode_arguments(
    own: GenerationConfig, given: GenerationConfig | None, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Merge the requested arguments: fields of `given` that differ from the checkpoint's `own`, overridden by
    `arguments`.

    Raises:
        UserError: if an argument in either of them is not supported in image mode.
    """
    asked: dict[str, Any] = {}
    if given is not None:
        for name in (*SAMPLING_NAMES, *_OUTPUTS, *IMAGE_MODE_REFUSES):
            value = getattr(given, name, None)
            if value is not None and value != getattr(own, name, None):
                asked[name] = value
    asked |= arguments
    for name, reason in IMAGE_MODE_REFUSES.items():
        if name in asked and not _is_neutral(name, asked[name]):
            raise UserError(f"image mode does not take {name}: {reason}")
    return {name: value for name, value in asked.items() if name not in IMAGE_MODE_REFUSES}


def check_text_mode(given: GenerationConfig, arguments: dict[str, Any]) -> None:
    """Raise UserError for an argument that stock models support and text mode of a unified model does not."""
    for name, reason in TEXT_MODE_REFUSES.items():
        value = arguments.get(name, getattr(given, name, None))
        if value not in (None, False) and (name != "cache_implementation" or value == "paged"):
            raise UserError(f"text mode does not take {name}={value}: {reason}")


def _is_neutral(name: str, value: Any) -> bool:
    if value is None or value is False:
        return True
    if isinstance(value, Tensor):
        return False
    if isinstance(value, list | tuple | dict):
        return not value
    if name == "cache_implementation" and value in _OWN_CACHES:
        return True
    return isinstance(value, int | float | str) and name in _NEUTRAL and bool(value == _NEUTRAL[name])
