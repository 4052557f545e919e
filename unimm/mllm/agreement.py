"""Consistency checks between the parts of a unified model: config, weights, tokenizer, processor and chat template.

Each part may be valid and the combination still wrong: a grid that the image tokenizer does not have, a marker that is
an image id, a template that renders nothing. Such errors are raised when the model is loaded, not seen in bad outputs.
"""

from collections.abc import Iterator
from typing import Any

from unimm.errors import UserError, one_line
from unimm.mllm.template_guard import render_guarded
from unimm.sampling import SAMPLING_NAMES, ImageSampling
from unimm.tokenizer.processing import image_disagreements

PROBE = "A word, please?"


def check_agreement(model: Any, processor: Any, source: object = "This model") -> None:
    """Raise UserError with the first of the `disagreements`."""
    for found in disagreements(model, processor):
        raise UserError(f"{source}: {found}.")


def disagreements(model: Any, processor: Any) -> Iterator[str]:
    """Yield every inconsistency as one sentence without its full stop."""
    yield from _of_text(processor)
    yield from _of_images(model, processor)
    yield from _of_token_ids(model, processor)
    yield from _of_drawing(model)


def _of_images(model: Any, processor: Any) -> Iterator[str]:
    config, tower = model.config, model.image_tokenizer.config
    drawn = list(tower.grid)
    for name, grid in (("config.json", config.image_grid), ("the processor", processor.image_grid)):
        if list(grid) != drawn:
            yield f"image_grid of {name} is {list(grid)}, and the image tokenizer draws {drawn[0]} x {drawn[1]} tokens"
    yield from image_disagreements(processor.image_processor, tower)
    if config.codebook_size != tower.codebook_size:
        yield f"codebook_size is {config.codebook_size}, and the image tokenizer has {tower.codebook_size} codes"
    if config.image_seq_length != processor.image_seq_length:
        yield (
            f"image_seq_length is {config.image_seq_length} in config.json and {processor.image_seq_length} in the "
            "processor"
        )


def _of_token_ids(model: Any, processor: Any) -> Iterator[str]:
    config, vocabulary = model.config, model.visual_vocabulary
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary.end != rows:
        yield f"image ids end at {vocabulary.end}, and the embedding has {rows} rows"
    if not 0 < config.text_vocab_size <= vocabulary.base:
        yield f"text_vocab_size is {config.text_vocab_size}, and the image ids start at {vocabulary.base}"
    for name in ("boi_token_id", "eoi_token_id", "image_token_id"):
        ours, theirs = getattr(config, name), getattr(processor, name)
        if ours != theirs:
            yield f"{name} is {ours} in config.json and {theirs} in the processor"
        elif ours is None or not 0 <= ours < vocabulary.base:
            yield f"{name} is {ours}, and text has the ids 0 to {vocabulary.base - 1}"
    if wrong := [token for token in config.null_prompt if token >= vocabulary.base]:
        yield f"null_prompt holds {wrong[0]}, and text has the ids 0 to {vocabulary.base - 1}"
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if wrong := [token for token in ends if not 0 <= token < vocabulary.base]:
        yield f"eos_token_id holds {wrong[0]}, and text has the ids 0 to {vocabulary.base - 1}"


def _of_drawing(model: Any) -> Iterator[str]:
    for name in ("image_generation", "image_editing"):
        stored = getattr(model.generation_config, name, None)
        if stored is not None and (not isinstance(stored, dict) or (set(stored) - set(SAMPLING_NAMES))):
            yield f"{name} of generation_config.json must be a mapping of {', '.join(SAMPLING_NAMES)}"
            return
        try:
            ImageSampling.of(model.generation_config, editing=name == "image_editing")
        except (UserError, TypeError) as error:
            yield f"{name} of generation_config.json cannot be used: {one_line(error).rstrip('.')}"
            return


def _of_text(processor: Any) -> Iterator[str]:
    tokenizer = processor.tokenizer
    words = len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys())
    if words == 0:
        yield "the vocabulary of its text tokenizer is empty, apart from special tokens"
    if tokenizer.pad_token_id is None:
        yield "its text tokenizer has no padding token: fetch tokenizer_config.json again, or attach the model again"
    if processor.chat_template is None:
        yield "it has no chat template: save the processor again, or attach the model again"
        return
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROBE}]}]
    try:
        chat = render_guarded(
            processor.chat_template, messages, add_generation_prompt=True, **tokenizer.special_tokens_map
        )
    except UserError as error:
        yield one_line(error).rstrip(".")
        return
    if PROBE not in chat or chat.count(processor.image_token) != 1:
        yield "the chat template leaves out what was said or shown"
