"""Write a language model with the image ids in its vocabulary as GGUF, the format of llama.cpp.

Names, metadata and layouts are those of llama.cpp's own `convert_hf_to_gguf.py`. An image id is a token of type UNUSED:
llama.cpp's tokenizer never produces one from text and prints nothing for it, so that a user's text cannot draw.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedModel

from unimm.errors import UserError
from unimm.export.onnx_files import write_onnx
from unimm.mllm.export import VOCABULARY_FILE, causal_lm, image_vocabulary
from unimm.mllm.processing import UnimmProcessor
from unimm.saving import whole_folder

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
"""Types of the matrices; vectors are always float32."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    _CONTRACTIONS + _WORDS % r"\p{N}": "qwen2",
    _CONTRACTIONS + _WORDS % r"\p{N}{1,3}": "llama-bpe",
}
"""Regular expression of a text tokenizer -> llama.cpp's name of it (`tokenizer.ggml.pre`)."""
GGUF_FILE, IMAGE_TOKENIZER = "model.gguf", "image_tokenizer"


def save_gguf(model: Any, processor: UnimmProcessor, folder: Path, weight_type: str = "f32") -> PreTrainedModel:
    """Write model.gguf, the image tokenizer as ONNX (`image_tokenizer/`) and image_vocabulary.json into `folder`.
    Return the language model.

    Args:
        weight_type: one of `TYPES`.

    Raises:
        UserError: llama.cpp has no such architecture, or would tokenize text in another way.
    """
    alone = causal_lm(model)
    kind, rows = alone.config.model_type, alone.config.vocab_size
    if kind not in ARCHITECTURES:
        raise UserError(f"The language model is a {kind}; GGUF is written for {', '.join(sorted(ARCHITECTURES))}.")
    refuse_other_computation(alone.config)
    vocabulary = image_vocabulary(model, processor)
    tokens = _tokens(processor.tokenizer, rows, vocabulary["image_vocab_start"])
    pre_tokenizer = pre_tokenizer_name(processor.tokenizer)
    with whole_folder(folder) as staging:
        writer = gguf.GGUFWriter(staging / GGUF_FILE, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]])
        _add_settings(writer, alone.config, TYPES[weight_type])
        _add_text_tokenizer(writer, processor, pre_tokenizer, tokens)
        for name, values, its_type in _tensors(alone, TYPES[weight_type]):
            writer.add_tensor(name, values, raw_dtype=its_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (staging / VOCABULARY_FILE).write_text(json.dumps(vocabulary, indent=2) + "\n", encoding="utf-8")
        (staging / IMAGE_TOKENIZER).mkdir()
        write_onnx(model.image_tokenizer, processor.image_processor, staging / IMAGE_TOKENIZER)
    return alone


def refuse_other_computation(config: Any) -> None:
    """Raise UserError for a setting with which llama.cpp would compute something else."""
    rope = config.rope_parameters["rope_type"]
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    wrong = {
        f"rope_type {rope!r} instead of 'default'": rope != "default",
        f"layers with {', '.join(sorted(sliding))} instead of full_attention": bool(sliding),
        f"hidden_act {config.hidden_act!r} instead of 'silu'": config.hidden_act != "silu",
        "attention_bias, which llama.cpp's qwen3 lacks": config.model_type == "qwen3" and config.attention_bias,
    }
    if found := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise UserError(f"The language model has {found[0]}: it is not written as GGUF; export it with --generation.")


def pre_tokenizer_name(tokenizer: Any) -> str:
    """Return llama.cpp's name of how a byte-level BPE splits text into words.

    Raises:
        UserError: it is no byte-level BPE, or llama.cpp does not know how it splits text.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = described["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    *before, last = steps
    if described["model"]["type"] != "BPE" or last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        raise UserError("GGUF is written for byte-level BPE text tokenizers only, and this model has another one.")
    if not before and last["use_regex"]:
        return "gpt-2"
    if [step["type"] for step in before] == ["Digits"] and before[0]["individual_digits"] and last["use_regex"]:
        return "smollm"
    if [step["type"] for step in before] == ["Split"] and not last["use_regex"]:
        known = PRE_TOKENIZERS.get(before[0]["pattern"].get("Regex"))
        if known and before[0]["behavior"] == "Isolated" and not before[0]["invert"]:
            return known
    raise UserError(
        f"llama.cpp does not know how this text tokenizer splits text into words; known are gpt-2, smollm, "
        f"{', '.join(PRE_TOKENIZERS.values())}."
    )


def _tokens(tokenizer: Any, rows: int, image_vocab_start: int) -> list[tuple[str, gguf.TokenType]]:
    """Return every row's string and type; rows without a string of the text tokenizer are UNUSED."""
    strings = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    found = []
    for number in range(rows):
        if number not in strings:
            image = number - image_vocab_start
            found.append((f"<|image_id_{image}|>" if image >= 0 else f"[PAD{number}]", gguf.TokenType.UNUSED))
        elif number not in added:
            found.append((strings[number], gguf.TokenType.NORMAL))
        else:
            special = added[number].special
            found.append((strings[number], gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED))
    return found


def _add_settings(writer: gguf.GGUFWriter, config: Any, weight_type: gguf.GGMLQuantizationType) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if weight_type.name == "F32" else f"MOSTLY_{weight_type.name}"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_text_tokenizer(
    writer: gguf.GGUFWriter, processor: UnimmProcessor, pre_tokenizer: str, tokens: list[tuple[str, gguf.TokenType]]
) -> None:
    tokenizer = processor.tokenizer
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([its_type for _, its_type in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    numbers: dict[str, Callable[[int], None]] = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, add in numbers.items():
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(number)
    writer.add_add_bos_token(tokenizer("")["input_ids"] == [tokenizer.bos_token_id])
    if template := processor.chat_template:
        # Only transformers has this tag, which marks what is trained; a comment trims whitespace as the tag does.
        writer.add_chat_template(re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template))


def _tensors(
    model: Any, weight_type: gguf.GGMLQuantizationType
) -> Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]:
    """Yield (llama.cpp's name, values, type) of every weight; a tied head is left out."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        its_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if its_name is None:
            raise UserError(f"llama.cpp's {config.model_type} has no weight {name}: it cannot be written as GGUF.")
        if config.model_type == "llama" and (heads := _rotated_heads(name, config)):
            tensor = _interleaved(tensor, heads)
        its_type = weight_type if tensor.ndim > 1 else TYPES["f32"]
        yield its_name, quantize(tensor.detach().to("cpu", torch.float32).contiguous().numpy(), its_type), its_type


def _rotated_heads(name: str, config: Any) -> int | None:
    """Return the number of heads of a query or key projection, and None for any other weight."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a projection [heads * width, ...]: llama.cpp's llama rotates neighbors (2 i, 2 i + 1), and
    transformers' rotates (i, i + width / 2)."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
