"""Parts of a unified model's configuration that are the same for every host family."""

import json
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from unimm.mllm.processing import UnimmProcessor
from unimm.mllm.vocabulary import set_vocab_size
from unimm.tokenizer import ImageTokenizer

_UNKEPT = ("architectures", "transformers_version", "_name_or_path", "dtype")  # not part of the architecture


def copy_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of the config: modules that share one config object would see each other's changes."""
    return AutoConfig.for_model(config.model_type, **{k: v for k, v in config.to_dict().items() if k != "model_type"})


def shared_fields(
    host: PreTrainedModel, image_tokenizer: ImageTokenizer, processor: UnimmProcessor, rows: int
) -> dict[str, Any]:
    """Return tower, text config, image vocabulary and the host's own config; `rows` is the host's vocabulary size."""
    text_config = copy_config(host.config.get_text_config())
    set_vocab_size(text_config, old=rows, new=processor.vocabulary.end)
    return {
        "vision_config": copy_config(image_tokenizer.config),
        "text_config": text_config,
        "image_seq_length": processor.image_seq_length,
        "text_vocab_size": rows,
        "image_vocab_start": processor.image_vocab_start,
        "codebook_size": processor.codebook_size,
        "image_grid": processor.image_grid,
        "boi_token_id": processor.boi_token_id,
        "eoi_token_id": processor.eoi_token_id,
        "null_prompt": processor.null_prompt_ids(),
        "tokenizer_fingerprint": image_tokenizer.fingerprint,
        "host_config": _as_stored(host.config),
    }


def _as_stored(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the config as config.json stores it: without defaults, with JSON keys."""
    fields: dict[str, Any] = json.loads(config.to_json_string())
    return {name: value for name, value in fields.items() if name not in _UNKEPT}
