"""`attach`: combine a language or multimodal model (the host) and an image tokenizer into one unified model that
understands and generates images.

The host is not modified. Its parts are copied into a new model, the text rows of the embedding and of the head bit for
bit, and rows for the image ids are added above a padded base (see `vocabulary.py`). The projector and the image rows
are untrained: train both before the model understands or generates images.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.initialization import no_init_weights

from unimm.checkpoint_files import examining, refuse_excess_of, refuse_non_finite
from unimm.errors import UserError, reading
from unimm.field_rules import check_attention
from unimm.mllm.attachment import Attachment
from unimm.mllm.defaults import generation_defaults
from unimm.mllm.hosts.heads import embedding_name
from unimm.mllm.hosts.registry import HOSTS, family_of
from unimm.mllm.hosts.text_check import check_text_host
from unimm.mllm.hosts.text_only import TEXT_HOSTS, is_text_only, text_only_config, text_only_decoder
from unimm.mllm.processing import UnimmProcessor
from unimm.mllm.templates import chat_template, end_of_turn_ids, is_published
from unimm.mllm.vocabulary import (
    Markers,
    RowInit,
    VisualVocabulary,
    add_markers,
    grow_rows,
    visual_base,
)
from unimm.saving import no_load_report, refuse_holes
from unimm.tokenizer import ImageTokenizer, ImageTokenizerProcessor
from unimm.tokenizer.loading import load_image_tokenizer


def attach(
    host: PreTrainedModel | str | Path,
    image_tokenizer: ImageTokenizer | str | Path,
    text_tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    *,
    row_init: RowInit = "random",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    image_position_mode: Literal["1d", "2d"] = "1d",
    chat_template: str | None = None,
    seed: int = 0,
    **loading: Any,
) -> tuple[Any, UnimmProcessor]:
    """Build a unified model from a host and an image tokenizer.

    Args:
        host: a causal language model (whatever `AutoModelForCausalLM` builds) or a multimodal model (`HOSTS`), or the
            path or hub id to load it from. The vision tower of a multimodal host is dropped; its projector is kept if
            the widths match.
        image_tokenizer: the tokenizer, or the path or hub id to load it from.
        text_tokenizer: the host's text tokenizer; None loads it from the host's `name_or_path`. It is copied; missing
            image markers are added to the copy.
        row_init: initialization of the new rows: "random", "mean" or "codebook" (`vocabulary.grow_rows`).
        dtype: dtype of the new model; None uses the host's. The codebook stays in float32.
        attn_implementation: as in transformers; None uses the host's.
        image_position_mode: positions of generated image tokens: "1d", as text; "2d", row and column, for hosts that
            use such positions for input images (M-RoPE).
        chat_template: name of a published chat template (`chat_formats.CHAT_FORMATS`: "vicuna_v1", "llama3", ...).
            None uses the text tokenizer's own, extended with images if it renders text only; "chatml" or
            "vicuna_turns" if it has none.
        seed: seed of all newly initialized weights.
        loading: `device_map` and other arguments of `from_pretrained`, used if the host is loaded here.

    Returns:
        (model, processor), the model in evaluation mode on the host's device; `model.attachment` lists what is new.

    Raises:
        UserError: if the host is unsupported (`check_text_host`), cannot merge the patch grid or lacks these positions,
            or if the chat template is unknown or belongs to another model.
        ValueError: if `row_init` is unknown, or a marker is not a single token.
    """
    check_attention(attn_implementation)
    if isinstance(host, str | Path):
        host = _load_host(host, loading)
    if isinstance(image_tokenizer, str | Path):
        image_tokenizer = load_image_tokenizer(image_tokenizer)
    _check_supported(host.config.model_type)
    if is_text_only(host.config.model_type):
        check_text_host(host)
    _check_positions(host.config.model_type, image_position_mode)
    texts = _copy_of(text_tokenizer, host)
    vocabulary_before = texts.get_vocab()
    markers = add_markers(texts, _placeholder(host, texts))
    rows = host.get_input_embeddings().weight.shape[0]
    vocabulary = VisualVocabulary(visual_base(rows, len(texts)), image_tokenizer.config.codebook_size)
    # Patches of an input image and image tokens of a generated one can differ in number (VFMTok).
    seen_tokens = image_tokenizer.config.num_patches // _merge(host, image_tokenizer) ** 2
    own_template = chat_template is None and texts.chat_template is not None and not is_published(texts.chat_template)
    processor = build_processor(image_tokenizer, texts, markers, vocabulary, seen_tokens, chat_template)
    processor.mark_images = markers.begin in vocabulary_before and markers.begin not in _rendered(
        texts, {"type": "image"}
    )
    if own_template and is_text_only(host.config.model_type):
        # the host's own template decides about the BOS token, whatever the tokenizer adds to plain text
        processor.begin_token = _rendered(texts, {"type": "text", "text": "?"}).startswith(texts.bos_token or "\0")
    compose = text_only_config if is_text_only(host.config.model_type) else HOSTS[host.config.model_type].unified_config
    config = compose(host, image_tokenizer, processor, rows)
    config.image_position_mode = image_position_mode
    dtype = dtype or host.dtype
    model = _frame(config, dtype, attn_implementation or _attention(host), seed)
    codes = None
    if row_init == "codebook":
        codes = image_tokenizer.lookup(torch.arange(vocabulary.size, device=image_tokenizer.device)[None])[0]
    state, lost = _composed_state(model, host, image_tokenizer, vocabulary, row_init, codes, seed)
    model.load_state_dict(state)
    _copy_buffers(_language_model(host), model.model.language_model)
    _copy_buffers(image_tokenizer, model.image_tokenizer)
    ends = end_of_turn_ids(texts, chat_template)
    model.generation_config = generation_defaults(host, texts, ends, keep=own_template)
    model.attachment = Attachment.of(host, lost)
    return model.to(host.device).eval(), processor


def _frame(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | dict[str, str], seed: int) -> Any:
    """Build the unified model in `dtype` with an initialized projector; all other weights are still to be loaded.

    Modules listed in `_keep_in_fp32_modules_strict` are in float32.
    """
    with no_init_weights():  # all weights but the projector's are loaded afterwards
        model = family_of(config).model._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.tie_weights()
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
        torch.manual_seed(seed)
        model.model.multi_modal_projector.apply(model._init_weights)
    kept = model._keep_in_fp32_modules_strict or set()
    for name, module in model.named_modules():
        if any(part in kept for part in name.split(".")):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
    return model


def _rendered(texts: PreTrainedTokenizerBase, part: dict[str, str]) -> str:
    """Render a user turn with this single part in the tokenizer's chat template."""
    return str(texts.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False))


def _load_host(path: str | Path, loading: dict[str, Any]) -> PreTrainedModel:
    """Load a host; raise UserError if it is not supported, incomplete or has weights that are not finite."""
    with examining("The host", path, loading.get("revision")):
        model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type", "nameless")
        _check_supported(model_type)
        auto = AutoModelForCausalLM if is_text_only(model_type) else AutoModelForImageTextToText
        refuse_excess_of(auto, AutoConfig.from_pretrained(path))
        with no_load_report():
            host, info = auto.from_pretrained(path, ignore_mismatched_sizes=True, output_loading_info=True, **loading)
        refuse_holes(host, info, path, refuse_unexpected=False)  # some published hosts ship unused weights
        refuse_non_finite(host, path)
        return host


def _check_supported(model_type: str) -> None:
    if not is_text_only(model_type) and model_type not in HOSTS:
        raise UserError(
            f"The host is a {model_type} model; supported are {', '.join(HOSTS)}, and language models that "
            f"AutoModelForCausalLM builds ({', '.join(TEXT_HOSTS)}, ...)."
        )


def _check_positions(model_type: str, mode: str) -> None:
    m_rope = [name for name, family in HOSTS.items() if family.has_m_rope]
    if mode not in ("1d", "2d") or (mode == "2d" and model_type not in m_rope):
        raise UserError(
            f'image_position_mode is {mode!r} and the host a {model_type} model: "2d" is for {" and ".join(m_rope)}, '
            'all others number a drawn image\'s tokens as text, "1d".'
        )


def _attention(host: PreTrainedModel) -> dict[str, str]:
    """Return the host's attention for the language model alone: the tower keeps its own, as after a reload."""
    return {"text_config": host.config.get_text_config()._attn_implementation}


def _language_model(host: PreTrainedModel) -> PreTrainedModel:
    """Return the host's decoder without its head."""
    return text_only_decoder(host) if is_text_only(host.config.model_type) else host.model.language_model


def _placeholder(host: PreTrainedModel, texts: PreTrainedTokenizerBase) -> str | None:
    """Return the placeholder token of a multimodal host for the features of an input image."""
    token_id = getattr(host.config, "image_token_id", None)
    return None if token_id is None else str(texts.convert_ids_to_tokens(token_id))


def _merge(host: PreTrainedModel, image_tokenizer: ImageTokenizer) -> int:
    """Return the side length, in patches, of the block that the host merges into one token.

    Raises:
        UserError: if the tokenizer's patch grid is not divisible by it.
    """
    text_only = is_text_only(host.config.model_type)
    merge = 1 if text_only else HOSTS[host.config.model_type].merged_side(host.config)
    rows, columns = image_tokenizer.config.patch_grid
    if rows % merge or columns % merge:
        raise UserError(
            f"The {host.config.model_type} host merges {merge} x {merge} patches, and the tokenizer's grid of {rows} x "
            f"{columns} does not divide by {merge}: take a tokenizer of another image or patch size."
        )
    return merge


def _copy_of(tokenizer: PreTrainedTokenizerBase | str | Path | None, host: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Return a copy of the text tokenizer, or load the host's."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return copy.deepcopy(tokenizer)
    source = tokenizer or host.config.name_or_path
    if not source:
        raise UserError("The host was built in memory, so its text tokenizer is unknown: give text_tokenizer.")
    with reading("The text tokenizer", source):
        texts = AutoTokenizer.from_pretrained(source)
        if texts.chat_template is None:  # some multimodal hosts store it in their processor's files only
            texts.chat_template = ProcessorMixin.get_processor_dict(source)[0].get("chat_template")
        return texts


def build_processor(
    image_tokenizer: ImageTokenizer,
    text_tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    vocabulary: VisualVocabulary,
    seen_tokens: int | None = None,
    template_name: str | None = None,
) -> UnimmProcessor:
    """Build the processor of a unified model. Sets a padding token (if missing) and a chat template on the text
    tokenizer.

    Args:
        seen_tokens: tokens of an input image, if not as many as of a generated one: the host merges patches, or the
            tokenizer's image tokens are not patches.
        template_name: name of a published chat template; None picks one that fits the text tokenizer.
    """
    template = chat_template(text_tokenizer, markers, template_name)
    text_tokenizer.chat_template = template
    if text_tokenizer.pad_token is None:
        text_tokenizer.pad_token = text_tokenizer.eos_token
    return UnimmProcessor(
        ImageTokenizerProcessor.for_tokenizer(image_tokenizer.config),
        text_tokenizer,
        image_grid=image_tokenizer.config.grid,
        image_vocab_start=vocabulary.base,
        codebook_size=vocabulary.size,
        image_token=markers.image,
        boi_token=markers.begin,
        eoi_token=markers.end,
        chat_template=template,
        image_seq_length=seen_tokens,
    )


def _composed_state(
    model: PreTrainedModel,
    host: PreTrainedModel,
    image_tokenizer: ImageTokenizer,
    vocabulary: VisualVocabulary,
    row_init: RowInit,
    codes: Tensor | None,
    seed: int,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict of the unified model, with grown rows, and the names of host tensors that were dropped
    because their shapes differ."""
    state, lost = model.state_dict(), []
    for name, tensor in _language_model(host).state_dict().items():
        state[f"model.language_model.{name}"] = tensor
    for name, tensor in () if is_text_only(host.config.model_type) else host.state_dict().items():
        if (kept := HOSTS[host.config.model_type].kept_name(name)) is not None:
            if state[kept].shape == tensor.shape:
                state[kept] = tensor
            else:
                lost.append(kept)
    for name, tensor in image_tokenizer.state_dict().items():
        state[f"model.vision_tower.{name}"] = tensor
    embedding = host.get_input_embeddings().weight
    grown = grow_rows(embedding, vocabulary, row_init=row_init, codes=codes, seed=seed)
    state[f"model.language_model.{embedding_name(model.model.language_model)}.weight"] = grown
    head = host.get_output_embeddings()
    if host.config.tie_word_embeddings:
        state["lm_head.weight"] = grown
    else:
        # another seed, or the new rows of an untied head would be correlated with those of the embedding
        state["lm_head.weight"] = grow_rows(head.weight, vocabulary, row_init=row_init, codes=codes, seed=seed + 1)
    if head.bias is not None:
        state["lm_head.bias"] = grow_rows(head.bias[:, None], vocabulary, row_init="mean")[:, 0]
    return state, lost


def _copy_buffers(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy the buffers (rotary frequencies) in their own precision, which casting the model would reduce."""
    for name, buffer in source.named_buffers():
        target.get_buffer(name).data = buffer.detach().to(target.device, copy=True)
