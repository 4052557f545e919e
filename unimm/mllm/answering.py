"""Batched answering of conversations, padded on the left, with any number of images in each.

An answer does not depend on the rest of the batch: padding is masked, and each answer is cut at the model's context
length counted from its own conversation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature

from unimm.errors import UserError

Conversation = list[dict[str, Any]]
"""Messages in the chat format of transformers, with PIL images."""


@dataclass(frozen=True)
class Answer:
    """The text of an answer, the length of its prompt, and its own length in tokens (without the end token)."""

    text: str
    prompt_tokens: int
    new_tokens: int


def chat_inputs(model: Any, processor: Any, conversations: Sequence[Conversation]) -> BatchFeature:
    """Return model inputs of conversations with a generation prompt, padded on the left, on the model's device.

    Markers in user text are encoded as plain characters: no text can open an image or end a turn.
    """
    inputs: BatchFeature = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    return inputs.to(model.device)


def edit_inputs(inputs: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of conversations with images to edit, and beside them those of `images`, the same conversations
    without instructions: with both, `generate` takes an `image_guidance_scale`."""
    extra = {"image_prompt_ids": images["input_ids"], "image_prompt_attention_mask": images["attention_mask"]}
    return {**inputs, **extra}


@torch.inference_mode()
def answer_all(
    model: Any, processor: Any, conversations: Sequence[Conversation], *, max_new_tokens: int, **generation: Any
) -> list[Answer]:
    """Generate one answer for each conversation, in their order.

    Args:
        generation: arguments of `model.generate` in text mode; greedy unless `do_sample=True`.

    Raises:
        UserError: if a conversation leaves no room for an answer.
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
    ends = end_tokens(model)
    rows = [_until_end(row[: context - length], ends) for row, length in zip(new, lengths, strict=True)]
    texts = [processor.post_process_multimodal_output(torch.tensor(row), generation_mode="text")[0] for row in rows]
    counted = zip(texts, lengths, rows, strict=True)
    return [Answer(text.strip(), length, len(row)) for text, length, row in counted]


def drop_oldest(processor: Any, history: Conversation, question: dict[str, Any], limit: int) -> Conversation:
    """Return the history without its oldest questions and their answers, as many as it takes to fit `limit` tokens
    together with the question. A system turn stays."""
    system, kept = system_and_turns(history)
    while kept and processor.count_tokens([*system, *kept, question]) > limit:
        kept = kept[next((n for n, turn in enumerate(kept) if n and turn["role"] == "user"), len(kept)) :]
    return [*system, *kept]


def system_and_turns(messages: Conversation) -> tuple[Conversation, Conversation]:
    """Return the system turn, if there is one, and the other turns."""
    start = 1 if messages and messages[0]["role"] == "system" else 0
    return messages[:start], messages[start:]


def end_tokens(model: Any) -> set[int]:
    """Return the tokens that end an answer; only padding follows them in a row."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
