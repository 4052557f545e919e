"""`attach`: a language or multimodal model and an image tokenizer become one model that reads images and draws
them.

Nothing is overwritten in place. The parts are copied into a new model, the text rows of the embedding
and of the head bit for bit, and the image rows are added above a padded base (see `vocabulary.py`). What is new is
untrained: the projector and the image rows; both need training before the model sees or draws anything.
"""

import copy
import json
from dataclasses import dataclass
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
from unimm.mllm.defaults import generation_defaults
from unimm.mllm.hosts.registry import HOSTS, M_ROPE, MULTIMODAL_HOSTS, UnimmLlavaConfig, merged_side
from unimm.mllm.processing import UnimmProcessor
from unimm.mllm.templates import chat_template, end_of_turn_ids, is_published
from unimm.mllm.vocabulary import (
    Markers,
    RowInit,
    VisualVocabulary,
    add_markers,
    grow_rows,
    set_vocab_size,
    visual_base,
)
from unimm.saving import no_load_report, refuse_holes
from unimm.tokenizer import ImageTokenizer, ImageTokenizerProcessor
from unimm.tokenizer.loading import load_image_tokenizer

TEXT_HOSTS = ("llama", "qwen2", "qwen3")  # model types of the text-only language models that are composed to a LLaVA
PARTS_OF_THEIR_OWN = ("model.vision_tower.", "model.visual.", "model.language_model.", "lm_head.")
"""What attaching exchanges or grows; everything else of a multimodal host (projector, newline) is taken as it is."""
_MOVED = {"model.visual.merger.": "model.multi_modal_projector.merger."}
SUPPORTED = (*TEXT_HOSTS, *MULTIMODAL_HOSTS)


_UNKEPT = ("architectures", "transformers_version", "_name_or_path", "dtype")  # of a host's config: not what it is


@dataclass(frozen=True)
class Attachment:
    """What became of a host's parts: `kept` bit for bit, and `untrained`, to be trained before it sees or draws."""

    host: str
    kept: tuple[str, ...]
    untrained: tuple[str, ...]

    def sentence(self) -> str:
        """For people: what to train, in the recipes' order."""
        stages = ["recipes/t2i.py (image rows)"]
        if "projector" in self.untrained:
            stages.insert(0, "recipes/sft.py (projector first, then all)")
        return (
            f"Kept of the {self.host}: {', '.join(self.kept)}. New and untrained: {', '.join(self.untrained)}. "
            f"Train with {', then '.join(stages)}."
        )


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
        host: a causal language model of one of `TEXT_HOSTS`, a multimodal model of one of `MULTIMODAL_HOSTS`, or where
            to load one from. A multimodal host's own tower is left behind; its projector is kept where the widths
            agree.
        image_tokenizer: the tokenizer, or where to load it from.
        text_tokenizer: the host's; None looks where the host came from. It is copied; markers it lacks are added to
            the copy.
        row_init: how the new rows begin: "random", "mean" or "codebook" (`vocabulary.grow_rows`).
        dtype: of the new model, the host's when None; the codebook stays in float32.
        attn_implementation: as in transformers; the host's when None.
        image_position_mode: "1d": a drawn image's tokens are numbered as text; "2d": by row and column, where the
            host does so with seen images (`M_ROPE`).
        chat_template: a published one by its name (`chat_formats.CHAT_FORMATS`: "vicuna_v1", "llama3", ...); None: the
            text tokenizer's own, extended by images if it renders text only; ChatML or plain turns if it has none.
        seed: of everything that is new.
        loading: `device_map` and other arguments of `from_pretrained`, for a host that is loaded here.

    Returns:
        (model, processor), the model in evaluation mode on the host's device; `model.attachment` says what is new.

    Raises:
        UserError: an unsupported host, a grid that the host cannot merge, positions that it does not have, or a chat
            template that is unknown or another model's.
        ValueError: unknown `row_init`, or a marker that is not one token.
    """
    check_attention(attn_implementation)
    if isinstance(host, str | Path):
        host = _load_host(host, loading)
    if isinstance(image_tokenizer, str | Path):
        image_tokenizer = load_image_tokenizer(image_tokenizer)
    _check_supported(host.config.model_type)
    _check_positions(host.config.model_type, image_position_mode)
    texts = _copy_of(text_tokenizer, host)
    vocabulary_before = texts.get_vocab()
    markers = add_markers(texts, _placeholder(host, texts))
    rows = host.get_input_embeddings().weight.shape[0]
    vocabulary = VisualVocabulary(visual_base(rows, len(texts)), image_tokenizer.config.codebook_size)
    # A host sees patches and draws image tokens, which need not be as many (VFMTok).
    seen_tokens = image_tokenizer.config.num_patches // _merge(host, image_tokenizer) ** 2
    own_template = chat_template is None and texts.chat_template is not None and not is_published(texts.chat_template)
    processor = build_processor(image_tokenizer, texts, markers, vocabulary, seen_tokens, chat_template)
    processor.mark_images = markers.begin in vocabulary_before and markers.begin not in _rendered(
        texts, {"type": "image"}
    )
    if own_template and host.config.model_type in TEXT_HOSTS:
        # its own template writes the begin token itself, or goes without, whatever the tokenizer adds to plain texts
        processor.begin_token = _rendered(texts, {"type": "text", "text": "?"}).startswith(texts.bos_token or "\0")
    compose = _multimodal_config if host.config.model_type in MULTIMODAL_HOSTS else _llava_config
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
    model.attachment = _attachment(host, lost)
    return model.to(host.device).eval(), processor


def _frame(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None, seed: int) -> Any:
    """The unified model in `dtype`, its projector drawn at random and everything else still to be filled; parts that
    ask for it (`_keep_in_fp32_modules_strict`) are in float32."""
    with no_init_weights():
        model = HOSTS[type(config)]._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.tie_weights()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.model.multi_modal_projector.apply(model._init_weights)
    kept = model._keep_in_fp32_modules_strict or set()
    for name, module in model.named_modules():
        if any(part in kept for part in name.split(".")):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
    return model


def _rendered(texts: PreTrainedTokenizerBase, part: dict[str, str]) -> str:
    """Render a user's turn that holds this part alone, in the tokenizer's chat template."""
    return str(texts.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False))


def _load_host(path: str | Path, loading: dict[str, Any]) -> PreTrainedModel:
    with examining("The host", path, loading.get("revision")):
        model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type", "nameless")
        _check_supported(model_type)
        auto = AutoModelForImageTextToText if model_type in MULTIMODAL_HOSTS else AutoModelForCausalLM
        refuse_excess_of(auto, AutoConfig.from_pretrained(path))
        with no_load_report():
            host, info = auto.from_pretrained(path, ignore_mismatched_sizes=True, output_loading_info=True, **loading)
        refuse_holes(host, info, path, refuse_unexpected=False)  # some published hosts carry weights that nobody reads
        refuse_non_finite(host, path)
        return host


def _check_supported(model_type: str) -> None:
    if model_type not in SUPPORTED:
        raise UserError(f"The host is a {model_type} model; supported are {', '.join(SUPPORTED)}.")


def _check_positions(model_type: str, mode: str) -> None:
    if mode not in ("1d", "2d") or (mode == "2d" and model_type not in M_ROPE):
        raise UserError(
            f'image_position_mode is {mode!r} and the host a {model_type} model: "2d" is for {" and ".join(M_ROPE)}, '
            'all others number a drawn image\'s tokens as text, "1d".'
        )


def _attention(host: PreTrainedModel) -> str | None:
    return host.config.get_text_config()._attn_implementation


def _language_model(host: PreTrainedModel) -> PreTrainedModel:
    """The host's decoder without its head."""
    return host.model.language_model if host.config.model_type in MULTIMODAL_HOSTS else host.base_model


def _placeholder(host: PreTrainedModel, texts: PreTrainedTokenizerBase) -> str | None:
    """The token that a multimodal host puts in place of a seen image's features."""
    token_id = getattr(host.config, "image_token_id", None)
    return None if token_id is None else str(texts.convert_ids_to_tokens(token_id))


def _merge(host: PreTrainedModel, image_tokenizer: ImageTokenizer) -> int:
    """Patches a side that the host merges into one token.

    Raises:
        UserError: the tokenizer's grid of patches does not divide by it.
    """
    merge = merged_side(host.config)
    rows, columns = image_tokenizer.config.patch_grid
    if rows % merge or columns % merge:
        raise UserError(
            f"The {host.config.model_type} host merges {merge} x {merge} patches, and the tokenizer's grid of {rows} x "
            f"{columns} does not divide by {merge}: take a tokenizer of another image or patch size."
        )
    return merge


def _attachment(host: PreTrainedModel, lost: list[str]) -> Attachment:
    multimodal = host.config.model_type in MULTIMODAL_HOSTS
    projector = not multimodal or any("multi_modal_projector" in name for name in lost)
    kept = ("language model", "text rows") if projector else ("language model", "text rows", "projector")
    untrained = ("projector", "image rows") if projector else ("image rows",)
    return Attachment(host.config.model_type, kept, untrained)


def _copy_of(tokenizer: PreTrainedTokenizerBase | str | Path | None, host: PreTrainedModel) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return copy.deepcopy(tokenizer)
    source = tokenizer or host.config.name_or_path
    if not source:
        raise UserError("The host was built in memory, so its text tokenizer is unknown: give text_tokenizer.")
    with reading("The text tokenizer", source):
        texts = AutoTokenizer.from_pretrained(source)
        if texts.chat_template is None:  # of some multimodal hosts it stands in their processor's files only
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
    """The processor of a unified model; the text tokenizer gets a padding token if it has none, and a chat template:
    the one of that name, or one that fits it.

    A seen image takes `seen_tokens`, where they differ from a drawn one's: the host merges patches, or the tokenizer
    has another number of image tokens than of patches.
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


def image_vocabulary_fields(
    host: PreTrainedModel, image_tokenizer: ImageTokenizer, processor: UnimmProcessor, text_rows: int
) -> dict[str, Any]:
    """The values of `vocabulary.ImageVocabularyFields`, the same for every host family."""
    return {
        "text_vocab_size": text_rows,
        "image_vocab_start": processor.image_vocab_start,
        "codebook_size": processor.codebook_size,
        "image_grid": processor.image_grid,
        "boi_token_id": processor.boi_token_id,
        "eoi_token_id": processor.eoi_token_id,
        "null_prompt": processor.null_prompt_ids(),
        "tokenizer_fingerprint": image_tokenizer.fingerprint,
        "host_config": _plain(host.config),
    }


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """What config.json would say of it: defaults left out, keys as JSON has them."""
    fields: dict[str, Any] = json.loads(config.to_json_string())
    return {name: value for name, value in fields.items() if name not in _UNKEPT}


def _llava_config(
    host: PreTrainedModel, image_tokenizer: ImageTokenizer, processor: UnimmProcessor, rows: int
) -> UnimmLlavaConfig:
    """A LLaVA over the host's text config; the tower's whole last layer, no CLS token to cut."""
    text_config = copy_config(host.config)
    set_vocab_size(text_config, old=rows, new=processor.vocabulary.end)
    fields = image_vocabulary_fields(host, image_tokenizer, processor, rows) | {
        "vision_config": copy_config(image_tokenizer.config),
        "text_config": text_config,
        "image_token_index": processor.image_token_id,
        "image_seq_length": processor.image_seq_length,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": host.config.tie_word_embeddings,
    }
    return UnimmLlavaConfig(**fields)


def _multimodal_config(
    host: PreTrainedModel, image_tokenizer: ImageTokenizer, processor: UnimmProcessor, rows: int
) -> PreTrainedConfig:
    """The host's own config with the tokenizer as its tower. The tower gives patches without CLS, and its last hidden
    state is the feature layer that the tokenizer taps."""
    text_config = copy_config(host.config.get_text_config())
    set_vocab_size(text_config, old=rows, new=processor.vocabulary.end)
    own = {k: v for k, v in host.config.to_dict().items() if k not in ("model_type", "architectures", "text_config")}
    token_field = "image_token_index" if "image_token_index" in own else "image_token_id"
    taps = (
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"} if "vision_feature_layer" in own else {}
    )
    if host.config.model_type in M_ROPE:
        own["spatial_merge_size"] = merged_side(host.config)
    changed = image_vocabulary_fields(host, image_tokenizer, processor, rows) | {
        "vision_config": copy_config(image_tokenizer.config),
        "text_config": text_config,
        token_field: processor.image_token_id,
        "image_seq_length": processor.image_seq_length,
    }
    return MULTIMODAL_HOSTS[host.config.model_type](**(own | taps | changed))


def copy_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """An equal config of its own: two modules that share one drift together."""
    return AutoConfig.for_model(config.model_type, **{k: v for k, v in config.to_dict().items() if k != "model_type"})


def _composed_state(
    model: PreTrainedModel,
    host: PreTrainedModel,
    image_tokenizer: ImageTokenizer,
    vocabulary: VisualVocabulary,
    row_init: RowInit,
    codes: Tensor | None,
    seed: int,
) -> tuple[dict[str, Tensor], list[str]]:
    """The new model's state: the host and the tokenizer in their places and grown rows; and the names of the host's
    tensors that found no place because their shapes differ."""
    state, lost = model.state_dict(), []
    for name, tensor in _language_model(host).state_dict().items():
        state[f"model.language_model.{name}"] = tensor
    for name, tensor in host.state_dict().items() if host.config.model_type in MULTIMODAL_HOSTS else ():
        for old, new in _MOVED.items():
            name = name.replace(old, new)
        if not name.startswith(PARTS_OF_THEIR_OWN):
            if state[name].shape == tensor.shape:
                state[name] = tensor
            else:
                lost.append(name)
    for name, tensor in image_tokenizer.state_dict().items():
        state[f"model.vision_tower.{name}"] = tensor
    embedding = host.get_input_embeddings().weight
    grown = grow_rows(embedding, vocabulary, row_init=row_init, codes=codes, seed=seed)
    state["model.language_model.embed_tokens.weight"] = grown
    if host.config.tie_word_embeddings:
        state["lm_head.weight"] = grown
    else:
        head = host.get_output_embeddings().weight
        state["lm_head.weight"] = grow_rows(head, vocabulary, row_init=row_init, codes=codes, seed=seed + 1)
    return state, lost


def _copy_buffers(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Constants of the architecture (rotary frequencies) in the precision that they have."""
    for name, buffer in source.named_buffers():
        target.get_buffer(name).data = buffer.detach().to(target.device, copy=True)
