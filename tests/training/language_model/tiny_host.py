"""A unified model of a few thousand weights and everything around it, for the tests of the host recipes."""

import copy
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unimm.data.conversations import shapes_corpus
from unimm.mllm import UnimmLlavaForConditionalGeneration, UnimmProcessor, attach
from unimm.tokenizer import VQRAE, VQRAEConfig
from unimm.training.language_model.small_model import CHAT_TOKENS, new_language_model
from unimm.training.language_model.text_tokenizer import train_text_tokenizer

ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
LLM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def tiny_image_tokenizer() -> VQRAE:
    """64 px, 4 x 4 image tokens, 32 codes."""
    return VQRAE(VQRAEConfig(encoder_config=dict(ENCODER), codebook_size=32, codebook_dim=8)).eval()


@cache
def _text_tokenizer() -> PreTrainedTokenizerBase:
    return train_text_tokenizer(shapes_corpus(50, 0), 400, CHAT_TOKENS)


def tiny_host() -> tuple[UnimmLlavaForConditionalGeneration, UnimmProcessor]:
    """A Qwen3 of 2 layers with the tiny image tokenizer attached."""
    tokenizer = copy.deepcopy(_text_tokenizer())
    return attach(new_language_model(LLM, tokenizer), tiny_image_tokenizer(), tokenizer, attn_implementation="eager")


def save_tiny_host(folder: Path) -> Path:
    """The tiny host as a checkpoint in `folder`."""
    model, processor = tiny_host()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
