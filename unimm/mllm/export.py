"""Export of a unified model to checkpoints that load without unimm.

`detach` restores the host (the language or multimodal model that the image tokenizer was attached to), with its own
class and number of rows. `stock_understanding` builds a stock LLaVA or InternVL with the plain encoder as its vision
tower, for any server of those, with the same logits. `causal_lm` returns the language model with the image ids in its
vocabulary, for any inference engine.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from unimm.errors import UserError
from unimm.mllm.hosts.configs import copy_config
from unimm.mllm.hosts.heads import embedding_name, head_name
from unimm.mllm.hosts.registry import EXTENDED, family_of
from unimm.mllm.hosts.text_only import is_text_only, text_only_model
from unimm.mllm.processing import UnimmProcessor
from unimm.mllm.vocabulary import set_vocab_size
from unimm.saving import whole_folder
from unimm.tokenizer.encoders import prefix_tokens

VOCABULARY_FILE = "image_vocabulary.json"
PROMPT = "{prompt}"


def detach(model: Any) -> PreTrainedModel:
    """Return the host that the tokenizer was attached to, in its own class and with its own number of rows.

    A multimodal host gets the tokenizer's encoder as its tower; this is its own tower if the tokenizer was built on it.

    Raises:
        UserError: if the host is unknown (attached by an older version), or tower or projector have other shapes.
    """
    if not model.config.host_config:
        raise UserError("This model does not say which host it was made of: attach it again with this version.")
    fields = copy.deepcopy(model.config.host_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    rows = config.get_text_config().vocab_size
    if is_text_only(config.model_type):
        decoder = _cut(model, rows)
        host, state = text_only_model(config, decoder, dtype=model.dtype)
    else:
        host = AutoModelForImageTextToText.from_config(config, dtype=model.dtype)
        state = _stock_state(model, rows)
    return _filled(host, state, model, rows)


def stock_understanding(model: Any, processor: UnimmProcessor) -> tuple[PreTrainedModel, Any]:
    """Build a stock model of the host's family with the plain encoder as its tower; its text logits are the same.

    Returns:
        (model, processor). For a LLaVA the processor is `LlavaProcessor`. Those of the other families tile images or
        take videos: use the host's own, only the text tokenizer is returned here.

    Raises:
        UserError: if a stock model cannot use the tokenizer's features.
    """
    tokenizer = model.image_tokenizer
    prefix = prefix_tokens(tokenizer.encoder.config)
    family, post_norm = family_of(model.config), tokenizer.config.apply_post_norm
    if post_norm != family.post_norm or prefix > 1:
        side = "behind" if post_norm else "before"
        what = f"{side} the encoder's final norm" if prefix <= 1 else f"behind {prefix} prefix tokens"
        raise UserError(
            f"The features lie {what}, where no stock {family.model_type} taps them: this model stays with unimm."
        )
    if (layers := tokenizer.config.feature_layers) != 1:
        raise UserError(
            f"The features are the sum of {layers} layers, and a stock {family.model_type} taps one: this model stays "
            "with unimm."
        )
    if family.export is None:
        raise UserError(
            f"A stock {family.model_type} reads patches of any image size with a tower of its "
            "own: this model stays with unimm, or goes out with --generation."
        )
    if getattr(model.config, "head_bias", False) or getattr(model.config, "finishes_logits", False):
        what = "a bias" if model.config.head_bias else "logits that are scaled or capped"
        raise UserError(
            f"The head of this {model.config.host_config['model_type']} has {what}, and a stock LLaVA's has not: this "
            "model stays with unimm, or goes out with --generation."
        )
    if family.export.encoder not in (None, encoder := tokenizer.encoder.config.model_type):
        raise UserError(
            f"A stock {family.model_type} has its own encoder only, this tokenizer is built on {encoder}: attach it to "
            "a LLaVA or a text-only model to export it."
        )
    rows = max(model.config.text_vocab_size, len(processor.tokenizer))
    text_config = copy_config(model.config.get_text_config())
    set_vocab_size(text_config, old=text_config.vocab_size, new=rows)
    strategy = "default" if prefix else "full"
    fields = {
        "vision_config": copy_config(tokenizer.encoder.config),
        "text_config": text_config,
        "vision_feature_layer": tokenizer.config.feature_layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": model.config.tie_word_embeddings,
    }
    own = model.config.to_dict()
    fields |= {name: own[name] for name in family.export.carried}
    config = family.stock(**{family.image_token_field: processor.image_token_id}, **fields)
    stock = AutoModelForImageTextToText.from_config(config, dtype=model.dtype)
    _filled(stock, _stock_state(model, rows), model, rows)
    if family.export.processor is None:
        return stock, processor.tokenizer
    return stock, family.export.processor(model, processor, strategy, prefix)


def causal_lm(model: Any) -> PreTrainedModel:
    """Return the language model alone, with all of its rows, image ids included."""
    text_config = _plain_text_config(model)
    text_config.tie_word_embeddings = model.config.tie_word_embeddings
    alone = AutoModelForCausalLM.from_config(text_config, dtype=model.dtype)
    state = _below(f"{alone.base_model_prefix}.", model.model.language_model.state_dict())
    return _filled(alone, state, model, text_config.vocab_size)


def save_generation(model: Any, processor: UnimmProcessor, folder: Path) -> PreTrainedModel:
    """Write `causal_lm` with its text tokenizer into `folder`, with the image tokenizer (`image_tokenizer/`, the
    decoder of the ids) and the range of the image ids (image_vocabulary.json). Return the language model."""
    alone = causal_lm(model)
    parts = {"": (alone, processor.tokenizer), "image_tokenizer": (model.image_tokenizer, processor.image_processor)}
    vocabulary = image_vocabulary(model, processor)
    with whole_folder(folder) as staging:
        for name, (part, its_processor) in parts.items():
            part.save_pretrained(staging / name)
            its_processor.save_pretrained(staging / name)
        (staging / VOCABULARY_FILE).write_text(json.dumps(vocabulary, indent=2) + "\n", encoding="utf-8")
    return alone


def image_vocabulary(model: Any, processor: UnimmProcessor) -> dict[str, Any]:
    """Return what an engine needs to draw.

    That is the rows of text, the range of the image ids, their grid, the markers, the prompts of an image
    (`drawing_prompt`, with `{prompt}` in place of the text, and the token ids `null_prompt`) and the sampling defaults.

    Raises:
        UserError: the chat template changes or repeats the text.
    """
    template = processor.drawing_prompt(PROMPT)
    if template.count(PROMPT) != 1:
        raise UserError(
            f"The chat template writes the prompt {template.count(PROMPT)} times instead of once: no other engine can "
            "write the prompts of this model."
        )
    return {
        "text_vocab_size": model.config.text_vocab_size,
        "image_vocab_start": model.config.image_vocab_start,
        "codebook_size": model.config.codebook_size,
        "image_grid": list(model.config.image_grid),
        "boi_token_id": model.config.boi_token_id,
        "eoi_token_id": model.config.eoi_token_id,
        "drawing_prompt": template,
        "null_prompt": list(model.config.null_prompt),
        "image_generation": model.generation_config.image_generation,
    }


def _plain_text_config(model: Any) -> PreTrainedConfig:
    """Return the language model's config as a standalone one. A Qwen-VL's has three rows of positions; they
    are equal if generated images are numbered as text, and the plain Qwen then computes the same.

    Raises:
        UserError: if generated images have row and column positions, which a plain language model does not support.
    """
    config = copy_config(model.config.get_text_config())
    if (plain := family_of(model.config).plain_text) is None:
        return config
    if model.config.image_position_mode != "1d":
        raise UserError(
            "This model draws with positions in rows and columns (image_position_mode 2d), which a plain language "
            'model does not have: attach with image_position_mode="1d" to export it.'
        )
    known = {field.name for field in dataclasses.fields(plain)}
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    rope = {name: value for name, value in config.rope_parameters.items() if not name.startswith("mrope")}
    return plain(**fields | {"rope_parameters": rope})


def _stock_state(model: Any, rows: int) -> dict[str, Tensor]:
    """Return the state dict of a stock multimodal model without its head: encoder, projector, language model."""
    other = ("model.vision_tower.", *EXTENDED)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(other)}
    return {
        **own,
        **_below("model.vision_tower.", model.image_tokenizer.encoder.state_dict()),
        **_below("model.language_model.", _cut(model, rows)),
    }


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _cut(model: Any, rows: int) -> dict[str, Tensor]:
    """Return the language model's state dict with only the first `rows` rows of its embedding."""
    state = model.model.language_model.state_dict()
    name = f"{embedding_name(model.model.language_model)}.weight"
    return {**state, name: state[name][:rows]}


def _filled(target: PreTrainedModel, state: dict[str, Tensor], model: Any, rows: int) -> PreTrainedModel:
    """Load `state` and the first `rows` rows of the model's head into `target`; copy generation defaults and device.

    Raises:
        UserError: if a tensor is missing or has another shape; a tied head needs none.
    """
    own = head_name(target)
    state |= {f"{own}.{name}": tensor[:rows] for name, tensor in model.get_output_embeddings().state_dict().items()}
    expected = target.state_dict()
    tied = set(target.all_tied_weights_keys)
    wrong = [
        name
        for name, tensor in expected.items()
        if name not in tied and (name not in state or state[name].shape != tensor.shape)
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(expected)} weights of the {target.config.model_type} are not in this model with the "
            f"same shape ({wrong[0]}, ...): its tower or projector was replaced when the tokenizer was attached."
        )
    target.load_state_dict({name: tensor for name, tensor in state.items() if name in expected}, strict=False)
    target.tie_weights()
    target.generation_config = copy.deepcopy(model.generation_config)
    return target.to(model.device).eval()
