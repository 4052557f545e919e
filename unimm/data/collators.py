"""Samples of messages -> padded tensors with exact label masks, one batch for each flow.

Special here: labels come from the chat template's own `{% generation %}` spans (`unimm.data.label_spans`), never from
tokenizing pieces again, and a sample whose spans and turns do not match is an error, not a silently empty row. Rows are
padded within their flow only, on the right, and cut behind the last label, so that short drawings do not pay for long
conversations.
The processor is given; any of the usual contract will do. B rows, L tokens, I pictures.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unimm.data.label_spans import check_every_turn_has_tokens, check_no_marker, parts_of, rendered, turn_tokens
from unimm.errors import UserError

IGNORED = -100


class ChatProcessor(Protocol):
    """What is needed of a processor: a chat template with generation marks, placeholders expanded to image tokens."""

    tokenizer: Any
    chat_template: str
    image_token: str
    image_token_id: int
    boi_token: str
    num_image_tokens: int

    def __call__(self, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


class FlowCollator:
    """Collate samples {"flow", "kind", "index", "messages"} into {flow: batch}.

    A batch holds
        input_ids, attention_mask [B, L]: placeholders stand for seen and for drawn image tokens alike;
        labels [B, L]: conversations: what the assistant says, its closing token included; drawings: the placeholders of
            the drawn image tokens only (to be replaced by their ids); -100 elsewhere;
        drawn [B, L] bool: those placeholders;
        pixel_values [I, 3, H, W]: pictures in the user's turns, drawn_pixel_values [I, 3, H, W]: in the assistant's;
        absent without any.

    A drawing's text is the very prompt that generation starts from, so it needs nothing of the template for it.

    Raises:
        UserError: a sample without an assistant turn, or whose label spans do not match its assistant turns, or that
        writes an image token; a drawing that does not end with one drawn picture.
    """

    def __init__(self, processor: ChatProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
        ordered = sorted(samples, key=lambda sample: sample["flow"])
        return {flow: self._batch(list(rows)) for flow, rows in groupby(ordered, key=lambda sample: sample["flow"])}

    def _batch(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        kind = self._drawn if samples[0]["kind"] == "drawing" else self._said
        inputs, drawn, labelled = kind(samples)
        input_ids = torch.as_tensor(inputs["input_ids"])
        attention_mask = torch.as_tensor(inputs["attention_mask"])
        length = int((labelled | (input_ids == self.processor.image_token_id)).any(0).nonzero()[-1]) + 1
        batch = {
            "input_ids": input_ids[:, :length],
            "attention_mask": attention_mask[:, :length],
            "labels": input_ids.masked_fill(~labelled, IGNORED)[:, :length],
            "drawn": drawn[:, :length],
        }
        batch |= _pictures(inputs.get("pixel_values"), _drawings(samples))
        return batch

    def _said(self, samples: list[dict[str, Any]]) -> tuple[Any, Tensor, Tensor]:
        """Conversations: inputs, drawn placeholders and labelled tokens [B, L], all of the assistant's turns."""
        processor, tokens = self.processor, self.processor.tokenizer.special_tokens_map
        for sample in samples:
            check_no_marker(sample, processor.image_token)
        conversations = [rendered(sample, processor.chat_template, tokens) for sample in samples]
        begun = tokens.get("bos_token") and conversations[0][0].startswith(tokens["bos_token"])
        inputs = processor(
            text=[text for text, _ in conversations],
            images=[part["image"] for sample in samples for part in _images(sample)],
            drawn=_drawings(samples),
            padding=True,
            padding_side="right",
            return_tensors="np",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            add_special_tokens=not begun,  # a template that writes the first token itself leaves none to the tokenizer
        )
        offsets = inputs.pop("offset_mapping")
        replacements = inputs.pop("text_replacement_offsets", None) or [[]] * len(samples)
        said = np.zeros(offsets.shape[:2], dtype=bool)
        for row, (sample, (_, spans)) in enumerate(zip(samples, conversations, strict=True)):
            turns = turn_tokens(spans, offsets[row], replacements[row])
            check_every_turn_has_tokens(sample, turns)
            said[row] = turns.any(0)
        labelled = torch.from_numpy(said)
        return inputs, labelled & (torch.as_tensor(inputs["input_ids"]) == processor.image_token_id), labelled

    def _drawn(self, samples: list[dict[str, Any]]) -> tuple[Any, Tensor, Tensor]:
        """Drawings: inputs, and the drawn placeholders [B, L], which are all that is labelled."""
        for sample in samples:
            _check_drawing(sample)
        processor = self.processor
        prompts = processor.apply_chat_template([s["messages"][:-1] for s in samples], add_generation_prompt=True)
        inputs = processor(
            text=[prompt + processor.boi_token + processor.image_token for prompt in prompts],
            images=[part["image"] for sample in samples for part in _images(sample)],
            drawn=_drawings(samples),
            padding=True,
            padding_side="right",
            return_tensors="np",
        )
        placeholders = torch.as_tensor(inputs["input_ids"]) == processor.image_token_id
        from_the_end = placeholders.flip(1).cumsum(1).flip(1)  # a picture to look at may come before the drawing
        drawn = placeholders & (from_the_end <= processor.num_image_tokens)
        return inputs, drawn, drawn


def _images(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for turn in sample["messages"] for part in parts_of(turn) if part["type"] == "image"]


def _check_drawing(sample: dict[str, Any]) -> None:
    last = sample["messages"][-1]
    if last["role"] != "assistant" or [part["type"] for part in parts_of(last)] != ["image"]:
        raise UserError(
            f"Sample {sample['index']} of the flow {sample['flow']!r} has nothing to learn: no drawn picture, which "
            "must be all of the assistant's last turn."
        )


def _drawings(samples: Sequence[dict[str, Any]]) -> list[bool]:
    """For each picture, in reading order, whether the assistant drew it."""
    return [
        turn["role"] == "assistant"
        for sample in samples
        for turn in sample["messages"]
        for part in parts_of(turn)
        if part["type"] == "image"
    ]


def _pictures(pixel_values: Any, drawings: Sequence[bool]) -> dict[str, Tensor]:
    """Split the pictures [I, 3, H, W], which come in reading order, by who shows them."""
    if pixel_values is None:
        return {}
    pixel_values, drawn = torch.as_tensor(pixel_values), torch.tensor(drawings)
    pictures = {"pixel_values": pixel_values[~drawn], "drawn_pixel_values": pixel_values[drawn]}
    return {name: values for name, values in pictures.items() if len(values)}
