"""Training of a byte-level BPE tokenizer on a few thousand lines, for small models trained from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with at most `vocab_size` entries; the same texts in the same order yield the same
    tokenizer.

    `<|endoftext|>` is added first and also used for padding; `special_tokens` follow it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
