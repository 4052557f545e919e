"""Drawings: a caption asks for an image and the assistant's turn holds it. Yields PIL images and text, never a tensor.

A share of the captions is replaced by the empty prompt, on which classifier-free guidance rests
(https://arxiv.org/abs/2207.12598). Sample n, its dropout included, is a pure function of (seed, n).
"""

import numpy as np
from PIL import Image

from unimm.data.conversations import Message, RowsFlow, message
from unimm.data.held_out import PartOfRows
from unimm.data.image_streams import crop
from unimm.data.shapes import render, sample_captioned_scene
from unimm.data.shapes.prompts import Split
from unimm.data.shuffling import Rows
from unimm.data.sources.ids import IdsFolder
from unimm.errors import UserError

NULL_PROMPT = ""


class ShapesDrawings:
    """Endless captioned scenes of the shapes data set; the split "test" holds captions that "train" never shows."""

    def __init__(self, seed: int, *, split: Split = "train", null_prompt_prob: float = 0.0) -> None:
        self.seed = seed
        self.split = split
        self.null_prompt_prob = checked_probability(null_prompt_prob)

    def messages(self, index: int) -> list[Message]:
        """Caption and drawing of sample `index`."""
        rng = np.random.default_rng((self.seed, index))
        scene, prompt = sample_captioned_scene(rng, split=self.split)
        return drawing(prompt.prompt, render(scene), null=rng.random() < self.null_prompt_prob)


class ImageDrawings(RowsFlow):
    """Captioned images of one's own, the centre cut out at `image_size` pixels."""

    def __init__(self, rows: Rows, *, seed: int, image_size: int, null_prompt_prob: float = 0.0) -> None:
        super().__init__(rows)
        self.seed = seed
        self.image_size = image_size
        self.null_prompt_prob = checked_probability(null_prompt_prob)

    def messages(self, index: int) -> list[Message]:
        """Caption and drawing of row `index` modulo the number of rows; each pass drops other captions."""
        row = self.row(index)
        null = dropped(self.seed, index, self.null_prompt_prob)
        return drawing(row["text"], crop(row["image"], self.image_size), null=null)


class IdDrawings(RowsFlow):
    """Captioned images that are ids already (`recipes/encode.py`)."""

    def __init__(
        self, ids: IdsFolder, *, seed: int, null_prompt_prob: float = 0.0, rows: PartOfRows | None = None
    ) -> None:
        """`rows` are those of the folder that are drawn from; None takes all."""
        super().__init__(rows or ids)
        self.ids = ids
        ids.require_captions()
        self.seed = seed
        self.null_prompt_prob = checked_probability(null_prompt_prob)

    def messages(self, index: int) -> list[Message]:
        """Caption and ids [M] of row `index` modulo the number of rows; each pass drops other captions."""
        row = self.row(index)
        asked = message("user", NULL_PROMPT if dropped(self.seed, index, self.null_prompt_prob) else row["text"])
        return [asked, {"role": "assistant", "content": [{"type": "image", "ids": row["ids"]}]}]


def dropped(seed: int, index: int, probability: float) -> bool:
    """Whether sample `index` loses its caption."""
    return bool(np.random.default_rng((seed, index)).random() < probability)


def drawing(prompt: str, image: Image.Image, *, null: bool = False) -> list[Message]:
    """The prompt (or the null prompt) in the user's turn, the image in the assistant's."""
    asked = message("user", NULL_PROMPT if null else prompt)
    return [asked, {"role": "assistant", "content": [{"type": "image", "image": image}]}]


def checked_probability(value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise UserError(f"null_prompt_prob lies in [0, 1) and is {value}.")
    return value
