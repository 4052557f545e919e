"""Text tokenizers of the two kinds that language models have, small, with the special tokens of every chat format."""

import io
import re

import sentencepiece
from tokenizers import Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from unimm.mllm.chat_formats import CHAT_FORMATS
from unimm.training.language_model.text_tokenizer import train_text_tokenizer

SENTENCEPIECE = ("plain", "vicuna_v1", "llama2", "mistral", "zephyr")
"""Formats of models with such a tokenizer; the others have byte-level BPE."""
WORDS = [
    "USER: What is in the picture? ASSISTANT: a red circle.",
    "User: yes Assistant: no [INST] one two [/INST] user model assistant system",
    "A chat between a curious user and an artificial intelligence assistant.",
    "You are a helpful assistant.\n\nIt is red.\n\nIt is blue.",
] * 20


def special_tokens() -> list[str]:
    """The tokens in angle brackets that the formats write."""
    written = "".join("".join((*each.user, *each.system, each.opening, each.closing)) for each in CHAT_FORMATS.values())
    return sorted(set(re.findall(r"<[^<>\s]+>", written)) - {"<<SYS>>", "<SYS>", "</SYS>"})


def byte_level(*, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """With `trim_offsets` white space has no place in the offsets, as in Llama 3."""
    tokenizer = train_text_tokenizer(WORDS, 420, tuple(special_tokens()))
    if trim_offsets:
        from tokenizers import processors

        backend: Tokenizer = tokenizer.backend_tokenizer
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def sentence_piece() -> LlamaTokenizer:
    """Llama's: BPE with byte fallback, `<s>` written by the tokenizer itself."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_writer=written,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    vocab = {model.id_to_piece(k): k for k in range(model.get_piece_size())}
    merges = _merges(vocab)
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, legacy=False)


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece BPE stands for: every split of a piece into two, in the order of their ranks."""
    pairs = [
        (vocab[piece], vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return [(left, right) for _, _, _, left, right in sorted(pairs)]


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    if name in SENTENCEPIECE:
        return sentence_piece()
    return byte_level(trim_offsets=name == "llama3")
