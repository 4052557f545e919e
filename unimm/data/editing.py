"""Image editing samples: the user's turn is an instruction and an image, the assistant's turn is the edited image (PIL
images and text, no tensors).

For guidance with two scales (InstructPix2Pix, https://arxiv.org/abs/2211.09800) a share of the samples loses its
instruction, and another share loses image and instruction, which leaves the null prompt of `unimm.data.text_to_image`.
Sample n, its dropout included, is a pure function of (seed, n).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from unimm.data.bad_rows import BadRow
from unimm.data.conversations import Message, RowsFlow
from unimm.data.image_streams import crop
from unimm.data.shapes import render
from unimm.data.shapes.edits import sample_edit
from unimm.data.shapes.shuffled import shuffled_patches
from unimm.data.shuffling import Rows
from unimm.data.sources.rows import ReadOptions
from unimm.data.text_to_image import NULL_PROMPT, drawing
from unimm.errors import UserError


class Dropout:
    """Which samples of an editing flow lose their text, or text and image.

    Args:
        null_text_prob: share that loses the instruction and keeps the image.
        null_prompt_prob: share that loses both.

    Raises:
        UserError: a share is outside [0, 1), or both together are 1 or more.
    """

    def __init__(self, seed: int, null_text_prob: float = 0.0, null_prompt_prob: float = 0.0) -> None:
        if min(null_text_prob, null_prompt_prob) < 0 or not null_text_prob + null_prompt_prob < 1:
            raise UserError(
                f"null_text_prob {null_text_prob} and null_prompt_prob {null_prompt_prob} must be 0 or more and below "
                "1 together."
            )
        self.seed, self.null_text_prob, self.null_prompt_prob = seed, null_text_prob, null_prompt_prob

    def messages(self, index: int, source: Image.Image, instruction: str, target: Image.Image) -> list[Message]:
        """Build the messages of sample `index`."""
        draw = np.random.default_rng((self.seed, index, 1)).random()
        if draw < self.null_prompt_prob:
            return drawing(NULL_PROMPT, target)
        lost = draw < self.null_prompt_prob + self.null_text_prob
        return editing(source, NULL_PROMPT if lost else instruction, target)


class ShapesEdits:
    """An endless stream of edits of scenes of the shapes data set.

    Args:
        kind_shares: share of each kind of edit; None uses the data set's own shares.
        shuffled_share: share of the edits that ask for a copy of an image of shuffled patches
            (`unimm.data.shapes.shuffled`).
    """

    def __init__(
        self,
        seed: int,
        dropout: Dropout | None = None,
        kind_shares: Mapping[str, float] | None = None,
        shuffled_share: float = 0.0,
    ) -> None:
        self.seed, self.dropout, self.kind_shares = seed, dropout or Dropout(seed), kind_shares
        self.shuffled_share = shuffled_share

    def messages(self, index: int) -> list[Message]:
        """Return source image, instruction and target image of sample `index`."""
        rng = np.random.default_rng((self.seed, index, 2))
        if rng.random() < self.shuffled_share:
            image, copied = shuffled_patches(rng), sample_edit(rng, "nothing")
            return self.dropout.messages(index, image, copied.instruction, image)
        edit = sample_edit(np.random.default_rng((self.seed, index)), kind_shares=self.kind_shares)
        return self.dropout.messages(index, render(edit.source), edit.instruction, render(edit.target))


class ImageEdits(RowsFlow):
    """An editing flow of external rows of `EditRows`, both images center-cropped to `image_size` pixels."""

    def __init__(self, rows: Rows, *, image_size: int, dropout: Dropout) -> None:
        super().__init__(rows)
        self.image_size, self.dropout = image_size, dropout

    def messages(self, index: int) -> list[Message]:
        """Return the messages of row `index` modulo the number of rows; each epoch drops other instructions."""
        row = self.row(index)
        source, target = (crop(row[name], self.image_size) for name in ("image", "target"))
        return self.dropout.messages(index, source, row["text"], target)


class EditRows(Rows):
    """Rows with the edited image as `target` (PIL RGB), read from the column `options.target_column`.

    Raises:
        UserError: there is no such column.
    """

    def __init__(self, rows: Rows, source: str, options: ReadOptions) -> None:
        require_targets(rows, source, options)
        self.rows, self.source, self.options = rows, source, options
        self.blocks, self.pool, self.column_names = rows.blocks, rows.pool, rows.column_names
        self.caption_gap = rows.caption_gap

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        name = f"{self.options.target_column} of row {row['key']} of {self.source}"
        target = self.options.image(row.get(self.options.target_column), name)
        if (before := row["image"].size) != target.size:
            raise BadRow("sizes differ", f"{name} has {target.size} pixels and its source {before}")
        return {**row, "target": target}


def require_targets(rows: Rows, source: str, options: ReadOptions) -> None:
    """Raise UserError if there is no column of edited images or no instruction."""
    if options.target_column not in rows.column_names:
        raise UserError(
            f"{source} has no column {options.target_column!r} of edited images; its columns are "
            f"{', '.join(rows.column_names) or 'none'}: name it in read.target_column."
        )
    if rows.caption_gap is not None:
        raise UserError(f"{source} has no instructions: {rows.caption_gap}.")


def editing(source: Image.Image, instruction: str, target: Image.Image) -> list[Message]:
    """Build the messages of an edit: the instruction and the image from the user, the edited image from the assistant.

    The image comes last, so that each of its tokens lies at one distance from its copy in the edited image, however
    long the instruction is: relative positions alone then find what to keep.
    """
    return [edit_request(source, instruction), drawing(instruction, target)[1]]


def edit_request(source: Image.Image, instruction: str) -> Message:
    """Build the user's turn of an edit."""
    return {"role": "user", "content": [{"type": "text", "text": instruction}, {"type": "image", "image": source}]}
