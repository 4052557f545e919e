"""A language model from nothing: its settings are checked and its text tokenizer knows the world's words."""

import pytest

from tests.training.language_model.tiny_host import LLM
from unimm.data.conversations import shapes_corpus
from unimm.data.shapes import COLORS, SHAPES
from unimm.errors import UserError
from unimm.training.language_model.small_model import CHAT_TOKENS, new_language_model
from unimm.training.language_model.text_tokenizer import train_text_tokenizer


def test_the_text_tokenizer_is_deterministic_and_knows_the_words() -> None:
    tokenizer, again = (train_text_tokenizer(shapes_corpus(300, 0), 600, CHAT_TOKENS) for _ in range(2))
    assert tokenizer.get_vocab() == again.get_vocab()
    assert len(tokenizer) <= 600
    for word in (*SHAPES, *COLORS):
        assert len(tokenizer.encode(f" {word}")) == 1
    for token in CHAT_TOKENS:
        assert len(tokenizer.encode(token)) == 1
    text = "any text, even Ünïcode \U0001f642\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_and_decided_fields_are_refused() -> None:
    tokenizer = train_text_tokenizer(["a b c"], 270, CHAT_TOKENS)
    assert new_language_model(LLM, tokenizer).get_input_embeddings().weight.shape == (len(tokenizer), 32)
    with pytest.raises(UserError, match="'hidden_sise'.*hidden_size"):
        new_language_model({**LLM, "hidden_sise": 1}, tokenizer)
    with pytest.raises(UserError, match="'vocab_size'"):
        new_language_model({**LLM, "vocab_size": 99}, tokenizer)
