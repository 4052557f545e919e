"""Random unified models of the smallest size: 16 image tokens, 32 codes, two layers of width 32."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from unimm.mllm import UnimmLlavaForConditionalGeneration, UnimmProcessor, attach
from unimm.testing.hosts import tiny_host
from unimm.tokenizer import VQRAE, VQRAEConfig
from unimm.training.language_model.text_tokenizer import train_text_tokenizer

TEXTS = ["a photo of a red circle", "is there a blue ring? yes no", "an image of two green squares", "one two three"]
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


def image_tokenizer(seed: int = 0) -> VQRAE:
    torch.manual_seed(seed)
    encoder = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    return VQRAE(VQRAEConfig(encoder_config=encoder.to_dict(), codebook_size=32, codebook_dim=8)).eval()


def text_tokenizer(special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> PreTrainedTokenizerFast:
    return train_text_tokenizer(TEXTS, 290, special)


def language_model(family: str = "qwen3", *, rows: int = 301, tied: bool = True, context: int = 256) -> PreTrainedModel:
    torch.manual_seed(1)
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.2,  # far from uniform, so that greedy choices are no ties
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        **extra,
    )
    return model_class(config).eval()


def unified(
    family: str = "qwen3", *, rows: int = 301, tied: bool = True, context: int = 256, **options: object
) -> tuple[UnimmLlavaForConditionalGeneration, UnimmProcessor]:
    def build() -> tuple[UnimmLlavaForConditionalGeneration, UnimmProcessor]:
        host = language_model(family, rows=rows, tied=tied, context=context)
        return attach(host, image_tokenizer(), text_tokenizer(), **options)

    return copied((family, rows, tied, context, repr(sorted(options.items()))), build)


def attached(family: str) -> tuple[Any, Any]:
    """A tiny host of `unimm.testing` with the image tokenizer attached, the same one each time."""

    def build() -> tuple[Any, Any]:
        torch.manual_seed(0)
        host, texts = tiny_host(family)
        return attach(host, image_tokenizer(), texts)

    return copied(family, build)


_BUILT: dict[Any, tuple[Any, Tensor]] = {}


def copied(key: Any, build: Callable[[], Any]) -> Any:
    """Return a copy of what `build` makes, which a process builds once; the random numbers go on as after building."""
    if key not in _BUILT:
        built = build()
        _BUILT[key] = built, torch.get_rng_state()
    built, state = _BUILT[key]
    torch.set_rng_state(state)
    return copy.deepcopy(built)


def image(color: str = "red") -> Image.Image:
    return Image.new("RGB", (20, 12), color)


def user(*parts: str | Image.Image) -> dict:
    """A user's turn of texts and images."""
    return {"role": "user", "content": [_part(part) for part in parts]}


def assistant(*parts: str | Image.Image) -> dict:
    return {"role": "assistant", "content": [_part(part) for part in parts]}


def _part(part: str | Image.Image) -> dict:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
