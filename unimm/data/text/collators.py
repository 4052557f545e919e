"""Data collator for multimodal conversations: samples of messages to padded tensors with exact label masks, one batch
per flow.

Labels come from the chat template's own `{% generation %}` spans (`unimm.data.text.label_spans`), never from
re-tokenizing pieces, and a sample whose spans and turns do not match raises an error instead of training on an empty
row. Rows are right-padded within their flow only and cut after the last label, so that short drawings do not pay for
long conversations; or several samples share a row (`unimm.data.text.packing`). B rows, L tokens, I images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from unimm.data.conversations import DRAWN_KINDS
from unimm.data.text.label_spans import check_every_turn_has_tokens, parts_of, rendered, turn_tokens
from unimm.data.text.packing import IGNORED, even_rows, pack
from unimm.data.text.truncation import fitting
from unimm.errors import UserError

logger = logging.get_logger(__name__)

LEAST_CHANGE = 0.25
"""Difference of normalized pixel values from which a patch counts as changed; that of JPEG files is below."""


class ChatProcessor(Protocol):
    """Interface of the processor: a chat template with generation marks, placeholders expanded to image tokens."""

    tokenizer: Any
    chat_template: str | dict[str, str]
    image_token: str
    image_token_id: int
    boi_token: str
    num_image_tokens: int
    image_seq_length: int
    image_grid: list[int]

    def __call__(self, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def encode(self, texts: Sequence[str], **kwargs: Any) -> Any: ...

    def mark_control_tokens(self, conversation: Sequence[Any]) -> list[Any]: ...


@dataclass
class _Rows:
    """Samples as padded rows: the processor's output, and which of its tokens are drawn and labelled [B, L]."""

    samples: list[dict[str, Any]]
    inputs: Any
    drawings: list[bool]
    drawn: Tensor
    labelled: Tensor


class FlowCollator:
    """Collate samples {"flow", "kind", "index", "messages"} into {flow: batch}.

    A batch holds
        input_ids, attention_mask [B, L]: the same placeholder stands for input and for drawn image tokens;
        labels [B, L]: for conversations and interleaved answers the assistant's tokens, markers and closing token
            included; for drawings and edits only the placeholders of the drawn image tokens (later replaced by their
            ids); -100 elsewhere;
        labels_at [n]: the positions, in a flattened [B, L], whose next token has a label;
        label_weights [n]: factors of their losses, only for flows in `changed_weights`;
        drawn [B, L] bool: the placeholders of drawn image tokens;
        pixel_values [I, 3, H, W]: images in the user's turns, drawn_pixel_values [I, 3, H, W]: in the assistant's;
            absent if there are none;
        drawn_ids [I, M]: instead of drawn_pixel_values if drawings are already ids.

    `changed_weights` are factors, by flow, of the loss of those image tokens whose patch differs between the image that
    is edited and its edit.

    With `max_length` a conversation is truncated to that many tokens, and a sample without any label left is dropped
    from its batch with a warning (`truncation`). With `pack_length` the samples of a flow share rows of at most that
    many tokens; `position_ids` [R, P] replace the attention mask (`unimm.data.text.packing`).

    A drawing's text is exactly the prompt that generation starts from, so it needs no marks in the template.

    Raises:
        UserError: a sample has no assistant turn, has label spans that do not match its assistant turns, or contains a
            lone surrogate; a drawing does not end with one drawn image. With `pack_length`: a sample is longer, or has
            an input image. With `max_length`: no sample of a batch is left.
    """

    def __init__(
        self,
        processor: ChatProcessor,
        *,
        max_length: int | None = None,
        pack_length: int | None = None,
        changed_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.pack_length = pack_length
        self.changed_weights = changed_weights or {}

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
        ordered = sorted(samples, key=lambda sample: sample["flow"])
        return {flow: self._batch(list(rows)) for flow, rows in groupby(ordered, key=lambda sample: sample["flow"])}

    def _batch(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = self._drawn(samples) if samples[0]["kind"] in DRAWN_KINDS else self._said(samples)
        labelled = rows.labelled
        input_ids = torch.as_tensor(rows.inputs["input_ids"])
        attention_mask = torch.as_tensor(rows.inputs["attention_mask"])
        # Cut after the last label or image token: image placeholders must stay, or they would not match the images.
        length = int((labelled | (input_ids == self.processor.image_token_id)).any(0).nonzero()[-1]) + 1
        batch = {
            "input_ids": input_ids[:, :length],
            "attention_mask": attention_mask[:, :length],
            "labels": input_ids.masked_fill(~labelled, IGNORED)[:, :length],
            "drawn": rows.drawn[:, :length],
        }
        batch |= _split_images(rows.inputs.get("pixel_values"), rows.drawings) | _ids(rows.samples)
        if self.pack_length is not None:
            batch = self._packed(rows.samples, batch, self.pack_length)
        batch["labels_at"] = _labels_at(batch["labels"])
        if (factor := self.changed_weights.get(samples[0]["flow"])) is not None:
            changed = _changed(rows.samples, batch, self.processor.image_grid)
            weights = torch.ones(batch["labels"].shape).masked_scatter(batch["drawn"], 1 + (factor - 1) * changed)
            batch["label_weights"] = _next(weights, 1.0).index_select(0, batch["labels_at"])
        return batch

    def _packed(self, samples: list[dict[str, Any]], batch: dict[str, Tensor], capacity: int) -> dict[str, Tensor]:
        flow = samples[0]["flow"]
        if "pixel_values" in batch:
            raise UserError(f"The flow {flow!r} has images to look at; only drawings and texts are packed.")
        lengths = batch["attention_mask"].sum(1)
        if (longest := int(lengths.max())) > capacity:
            raise UserError(
                f"Sample {samples[int(lengths.argmax())]['index']} of the flow {flow!r} has {longest} tokens and a "
                f"packed row {capacity}: raise train.pack_length."
            )
        return pack(batch, even_rows(lengths.tolist(), capacity), self.processor.tokenizer.pad_token_id)

    def _said(self, samples: list[dict[str, Any]]) -> _Rows:
        """Tokenize conversations: all of the assistant's turns are labelled."""
        processor, tokens = self.processor, self.processor.tokenizer.special_tokens_map
        marked = [{**sample, "messages": self._marked(sample)} for sample in samples]
        conversations = [rendered(sample, processor.chat_template, tokens) for sample in marked]
        inputs = processor(
            text=[text for text, _ in conversations],
            images=[part["image"] for sample in samples for part in _image_parts(sample)],
            drawn=_drawings(samples),
            padding=True,
            padding_side="right",
            return_tensors="np",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        offsets = inputs.pop("offset_mapping")
        replacements = inputs.pop("text_replacement_offsets", None) or [[]] * len(samples)
        said = np.zeros(offsets.shape[:2], dtype=bool)
        for row, (sample, (_, spans)) in enumerate(zip(samples, conversations, strict=True)):
            turns = turn_tokens(spans, offsets[row], replacements[row])
            check_every_turn_has_tokens(sample, turns)
            said[row] = turns.any(0)
        if self.max_length is not None:
            samples, said = self._cut(samples, inputs, said, self.max_length)
        labelled = torch.from_numpy(said)
        drawn = labelled & (torch.as_tensor(inputs["input_ids"]) == processor.image_token_id)
        return _Rows(samples, inputs, _drawings(samples) if self.max_length is None else [], drawn, labelled)

    def _marked(self, sample: dict[str, Any]) -> list[Any]:
        """Mark control-token strings in the sample's messages, so that they are tokenized as plain characters."""
        try:
            return self.processor.mark_control_tokens(sample["messages"])
        except UserError as error:
            raise UserError(f"Sample {sample['index']} of the flow {sample['flow']!r}: {error}") from None

    def _cut(
        self, samples: list[dict[str, Any]], inputs: Any, said: np.ndarray, capacity: int
    ) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Truncate rows to `capacity` tokens; return the samples with labels left and their label mask [B', L].
        `inputs` is changed in place."""
        processor, flow = self.processor, samples[0]["flow"]
        if any(_drawings(samples)):
            raise UserError(
                f"The flow {flow!r} has drawings inside conversations; they are not cut: no train.max_length."
            )
        mask = inputs["attention_mask"].astype(bool)
        learns, kept_images = [], []
        for row, sample in enumerate(samples):
            ids = inputs["input_ids"][row, : mask[row].sum()]
            tokens, whole = fitting(ids, capacity, processor.image_token_id, processor.image_seq_length)
            mask[row, tokens:] = said[row, tokens:] = False
            learns.append(bool(said[row].any()))
            kept_images += [learns[-1] and image < whole for image in range(len(_image_parts(sample)))]
            if not learns[-1]:
                logger.warning(
                    f"Sample {sample['index']} of the flow {flow!r} is left out: nothing is learned in its first "
                    f"{capacity} of {len(ids)} tokens."
                )
        if not any(learns):
            raise UserError(
                f"No sample of a batch of the flow {flow!r} learns anything in its first {capacity} tokens."
            )
        ids = np.where(mask, inputs["input_ids"], processor.tokenizer.pad_token_id)
        inputs["input_ids"], inputs["attention_mask"] = ids[learns], mask[learns].astype(np.int64)
        if kept_images:
            inputs["pixel_values"] = inputs["pixel_values"][kept_images]
        return [sample for sample, each in zip(samples, learns, strict=True) if each], said[learns]

    def _drawn(self, samples: list[dict[str, Any]]) -> _Rows:
        """Tokenize drawings: only the placeholders of the drawn image are labelled."""
        for sample in samples:
            _check_drawing(sample)
        processor = self.processor
        asked = [self._marked(sample)[:-1] for sample in samples]
        prompts = processor.apply_chat_template(asked, add_generation_prompt=True)
        how = {"padding": True, "padding_side": "right", "return_tensors": "np"}
        if _ids(samples):  # without an image the processor cannot expand placeholders, so write them out here
            drawing = processor.boi_token + processor.image_token * processor.num_image_tokens
            inputs = processor.encode([prompt + drawing for prompt in prompts], **how)
        else:
            inputs = processor(
                text=[prompt + processor.boi_token + processor.image_token for prompt in prompts],
                images=[part["image"] for sample in samples for part in _image_parts(sample)],
                drawn=_drawings(samples),
                **how,
            )
        image_tokens = torch.as_tensor(inputs["input_ids"]) == processor.image_token_id
        from_the_end = image_tokens.flip(1).cumsum(1).flip(1)  # an input image may come before the drawing
        drawn = image_tokens & (from_the_end <= processor.num_image_tokens)
        return _Rows(samples, inputs, _drawings(samples), drawn, drawn)


def _labels_at(labels: Tensor) -> Tensor:
    """Return the positions in a flattened [B, L] that predict a label, [n]; found here, on the CPU, because a device
    that searches for them makes the host wait for the number n."""
    return (_next(labels, IGNORED) != IGNORED).nonzero()[:, 0]


def _next(rows: Tensor, last: float) -> Tensor:
    """Return what belongs to the next token of each token of [B, L], flattened; `last` after the last one."""
    return F.pad(rows[:, 1:], (0, 1), value=last).flatten()


def _changed(samples: Sequence[dict[str, Any]], batch: dict[str, Tensor], grid: Sequence[int]) -> Tensor:
    """Return for each image token [B, M] of edits whether its patch differs from the source's: 1.0 or 0.0; 0.0 without
    a source."""
    edited = torch.tensor([len(_image_parts(sample)) == 2 for sample in samples])
    changed = torch.zeros(len(samples), grid[0] * grid[1])
    if edited.any():
        difference = (batch["pixel_values"] - batch["drawn_pixel_values"][edited]).abs().amax(1)  # [I, H, W]
        changed[edited] = (F.adaptive_max_pool2d(difference, list(grid)) > LEAST_CHANGE).float().flatten(1)
    return changed


def _image_parts(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for turn in sample["messages"] for part in parts_of(turn) if part["type"] == "image"]


def _check_drawing(sample: dict[str, Any]) -> None:
    last = sample["messages"][-1]
    if last["role"] != "assistant" or [part["type"] for part in parts_of(last)] != ["image"]:
        raise UserError(
            f"Sample {sample['index']} of the flow {sample['flow']!r} has nothing to learn: no drawn image, which "
            "must be all of the assistant's last turn."
        )


def _drawings(samples: Sequence[dict[str, Any]]) -> list[bool]:
    """Return for each image, in reading order, whether the assistant drew it."""
    return [
        turn["role"] == "assistant"
        for sample in samples
        for turn in sample["messages"]
        for part in parts_of(turn)
        if part["type"] == "image"
    ]


def _ids(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack the drawings that are already ids as {"drawn_ids": [I, M]}; empty if there are none."""
    ids = [part["ids"] for sample in samples for part in _image_parts(sample) if "ids" in part]
    return {"drawn_ids": torch.from_numpy(np.stack(ids))} if ids else {}


def _split_images(pixel_values: Any, drawings: Sequence[bool]) -> dict[str, Tensor]:
    """Split the images [I, 3, H, W], in reading order, into input and drawn images; `drawings` is empty for truncated
    rows, which have no drawn images."""
    if pixel_values is None:
        return {}
    drawings = drawings or [False] * len(pixel_values)
    pixel_values, drawn = torch.as_tensor(pixel_values), torch.tensor(drawings)
    images = {"pixel_values": pixel_values[~drawn], "drawn_pixel_values": pixel_values[drawn]}
    return {name: values for name, values in images.items() if len(values)}
