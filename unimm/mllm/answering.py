"""Answers to many conversations at once: one batch, padded on the left, any number of pictures in each.

Special here: a conversation's answer does not depend on its company. Rows of different lengths share one forward, the
mask tells them apart, and each answer ends where its own conversation leaves no more room in the model's context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature

from unimm.errors import UserError
from unimm.mllm.processing import TOKENIZING

Conversation = list[dict[str, Any]]
"""Messages in the chat format of transformers, pictures as PIL images in them."""


@dataclass(frozen=True)
class Answer:
    """What was said, how many tokens were read before it, and how many it took (its end token not counted)."""

    text: str
    prompt_tokens: int
    new_tokens: int


def chat_inputs(model: Any, processor: Any, conversations: Sequence[Conversation]) -> BatchFeature:
    """Model inputs of conversations that the assistant is to go on with, on the model's device; padded on the left.

    Markers in what people said are plain characters: no text can open a picture or end a turn.
    """
    tokenizer = processor.tokenizer
    # The library refuses a tokenizer that adds a begin token (Vicuna's) to plain text: it is added below.
    with TOKENIZING:
        begins = tokenizer.bos_token_id is not None and tokenizer("").input_ids == [tokenizer.bos_token_id]
    inputs = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
        processor_kwargs={"padding": True, **({"add_special_tokens": False} if begins else {})},
    )
    return (_begin(inputs, tokenizer.bos_token_id) if begins else inputs).to(model.device)


def _begin(inputs: BatchFeature, token_id: int) -> BatchFeature:
    """Every row [L], padded on the left, with `token_id` before its first token, unless the template wrote it."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows, first = torch.arange(len(ids)), mask.argmax(1)
    if (ids[rows, first] == token_id).all():
        return inputs
    longer = {
        name: nn.functional.pad(value, (1, 0)) if torch.is_tensor(value) and value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    longer["input_ids"][rows, first] = token_id  # all rows moved one place to the right
    longer["attention_mask"][rows, first] = 1
    return BatchFeature(longer)


@torch.inference_mode()
def answer_all(
    model: Any, processor: Any, conversations: Sequence[Conversation], *, max_new_tokens: int, **generation: Any
) -> list[Answer]:
    """One answer for each conversation, in their order.

    Args:
        generation: of `model.generate` in text mode; greedy unless it says `do_sample=True`.

    Raises:
        UserError: a conversation leaves no room for an answer.
    """
    inputs = chat_inputs(model, processor, conversations)
    lengths = inputs["attention_mask"].sum(1).tolist()
    context = model.config.get_text_config().max_position_embeddings
    for number, length in enumerate(lengths, 1):
        if length >= context:
            raise UserError(
                f"Conversation {number} of {len(lengths)} is {length} tokens long and the model reads {context}, its "
                "answer among them: it cannot be asked this."
            )
    settings = {"do_sample": False, **generation, "max_new_tokens": max_new_tokens}
    written = model.generate(**inputs, generation_mode="text", **settings)
    new = written[:, inputs["input_ids"].shape[1] :].tolist()
    ends = _end_tokens(model)
    rows = [_until_end(row[: context - length], ends) for row, length in zip(new, lengths, strict=True)]
    texts = [processor.post_process_multimodal_output(torch.tensor(row), generation_mode="text")[0] for row in rows]
    counted = zip(texts, lengths, rows, strict=True)
    return [Answer(text.strip(), length, len(row)) for text, length, row in counted]


def _end_tokens(model: Any) -> set[int]:
    """Tokens after which an answer's row holds padding only."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {token for token in (*ends, config.pad_token_id) if token is not None}


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
