"""Text-to-image samples ("drawings"): the user's turn is a caption, the assistant's turn is the image (PIL images and
text, no tensors).

A share of the captions is replaced by the empty prompt, for classifier-free guidance
(https://arxiv.org/abs/2207.12598). Sample n, its caption dropout included, is a pure function of (seed, n).
"""

import numpy as np
from PIL import Image

from unimm.data.conversations import Message, RowsFlow, message
from unimm.data.held_out import PartOfRows
from unimm.data.resizing import crop
from unimm.data.shapes import render, sample_captioned_scene
from unimm.data.shapes.phrasings import sample_request
from unimm.data.shapes.prompts import Split, scene_for
from unimm.data.shuffling import Rows
from unimm.data.sources.ids import IdsFolder
from unimm.errors import UserError

NULL_PROMPT = ""


class ShapesDrawings:
    """An endless stream of captioned scenes of the shapes data set; captions of the split "test" never occur in
    "train"."""

    def __init__(
        self, seed: int, *, split: Split = "train", null_prompt_prob: float = 0.0, phrasing_share: float = 0.0
    ) -> None:
        """Initialize; `phrasing_share` of the captions have a wording of `unimm.data.shapes.phrasings`."""
        self.seed = seed
        self.split = split
        self.phrasing_share = phrasing_share
        self.null_prompt_prob = checked_probability(null_prompt_prob)

    def messages(self, index: int) -> list[Message]:
        """Return caption and image of sample `index`."""
        rng = np.random.default_rng((self.seed, index))
        words = np.random.default_rng((self.seed, index, 1))
        if words.random() < self.phrasing_share:
            _, prompt = sample_request(words, split=self.split)
            scene = scene_for(rng, prompt)
        else:
            scene, prompt = sample_captioned_scene(rng, split=self.split)
        return drawing(prompt.prompt, render(scene), null=rng.random() < self.null_prompt_prob)


class ImageDrawings(RowsFlow):
    """A text-to-image flow of external captioned images, center-cropped to `image_size` pixels."""

    def __init__(self, rows: Rows, *, seed: int, image_size: int, null_prompt_prob: float = 0.0) -> None:
        super().__init__(rows)
        self.seed = seed
        self.image_size = image_size
        self.null_prompt_prob = checked_probability(null_prompt_prob)

    def messages(self, index: int) -> list[Message]:
        """Return caption and image of row `index` modulo the number of rows; each epoch drops other captions."""
        row = self.row(index)
        null = dropped(self.seed, index, self.null_prompt_prob)
        return drawing(row["text"], crop(row["image"], self.image_size), null=null)


class IdDrawings(RowsFlow):
    """A text-to-image flow of captioned images that are already encoded as ids (`recipes/encode.py`)."""

    def __init__(
        self, ids: IdsFolder, *, seed: int, null_prompt_prob: float = 0.0, rows: PartOfRows | None = None
    ) -> None:
        """Initialize from a folder of ids; `rows` selects a part of it, None takes all."""
        super().__init__(rows or ids)
        self.ids = ids
        ids.require_captions()
        self.seed = seed
        self.null_prompt_prob = checked_probability(null_prompt_prob)

    def messages(self, index: int) -> list[Message]:
        """Return caption and ids [M] of row `index` modulo the number of rows; each epoch drops other captions."""
        row = self.row(index)
        asked = message("user", NULL_PROMPT if dropped(self.seed, index, self.null_prompt_prob) else row["text"])
        return [asked, {"role": "assistant", "content": [{"type": "image", "ids": row["ids"]}]}]


def dropped(seed: int, index: int, probability: float) -> bool:
    """Return whether the caption of sample `index` is dropped."""
    return bool(np.random.default_rng((seed, index)).random() < probability)


def drawing(prompt: str, image: Image.Image, *, null: bool = False) -> list[Message]:
    """Build the messages of a drawing: the prompt (or the null prompt) from the user, the image from the assistant."""
    asked = message("user", NULL_PROMPT if null else prompt)
    return [asked, {"role": "assistant", "content": [{"type": "image", "image": image}]}]


def checked_probability(value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise UserError(f"null_prompt_prob lies in [0, 1) and is {value}.")
    return value
