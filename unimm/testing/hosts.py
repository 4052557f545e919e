"""Build tiny random hosts, encoders and image tokenizers of every family that `attach` supports.

A host is the language or multimodal model that an image tokenizer is attached to.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unimm.mllm.hosts.registry import HOSTS
from unimm.mllm.hosts.text_only import TEXT_HOSTS
from unimm.tokenizer import VQRAE
from unimm.tokenizer.encoders import FAMILIES, encoder_family

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

_IMAGE = {"image_size": 16, "patch_size": 4}

_MLP = {"intermediate_size": 64}

ROWS = 320

# text-only host -> fields of its config beside `_SIZES`: what makes the family differ from a Llama, in small
_TEXT: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5, "pad_token_id": 0},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "olmo2": {},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    "cohere": {"logit_scale": 0.0625, "tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
    "gpt_neox": {"rotary_pct": 0.25},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    "falcon": {"tie_word_embeddings": True},
    "smollm3": {"pad_token_id": 0, "tie_word_embeddings": True},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}

HOST_FAMILIES = (*TEXT_HOSTS, *HOSTS)

ENCODER_FAMILIES = tuple(FAMILIES)


def text_tokenizer(special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Return a byte-level text tokenizer (one token per byte) with the special tokens."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[: 3 + len(special)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[0], pad_token=names[0])


def vision_config(family: str) -> PreTrainedConfig:
    """Return the configuration of a tiny encoder: 16 px images, patches of 4 x 4 px, two layers of width 32."""
    return AutoConfig.for_model(family, **_SIZES, **_IMAGE, **FAMILIES[family].tiny)


def tiny_host(family: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Build a random host of the family and its text tokenizer."""
    torch.manual_seed(seed)
    text = {
        **_SIZES,
        **_MLP,
        "vocab_size": ROWS,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # far from uniform, so that greedy choices are no ties
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family in TEXT_HOSTS:
        config = AutoConfig.for_model(family, **text | _TEXT[family])
        return AutoModelForCausalLM.from_config(config).eval(), text_tokenizer(())
    tiny = HOSTS[family].tiny
    tokenizer = text_tokenizer(tuple(tiny.tokens))
    tokens = {name: tokenizer.convert_tokens_to_ids(token) for token, name in tiny.tokens.items() if name}
    tower = tiny.tower if tiny.encoder is None else vision_config(tiny.encoder).to_dict()
    config = AutoConfig.for_model(
        family,
        vision_config=dict(tower),
        text_config={**text, **tiny.text},
        tie_word_embeddings=False,
        **tokens,
        **tiny.fields,
    )
    return AutoModelForImageTextToText.from_config(config).eval(), tokenizer


def tiny_tokenizer(host: PreTrainedModel, encoder: str) -> tuple[VQRAE, bool]:
    """Build an image tokenizer on an encoder of the family.

    Returns:
        The tokenizer, and whether it uses the host's own encoder, which it does if the families match.
    """
    layer, post_norm, config = -1, False, vision_config(encoder)
    family = HOSTS.get(host.config.model_type)
    own = family is not None and family.tiny.encoder == encoder
    if family is not None and own:
        post_norm, config = family.post_norm, host.model.vision_tower.config
        layer = -1 if post_norm else host.config.vision_feature_layer
    torch.manual_seed(1)
    mean, std = encoder_family(config).normalization
    fields = {"codebook_size": 32, "codebook_dim": 8, "feature_layer": layer, "image_mean": mean, "image_std": std}
    tokenizer = VQRAE(VQRAE.config_class(encoder_config=config.to_dict(), apply_post_norm=post_norm, **fields)).eval()
    if own:
        tokenizer.encoder.load_state_dict(host.model.vision_tower.state_dict())
    return tokenizer, own
