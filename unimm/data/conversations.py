"""Conversations about an image, as messages in Hugging Face's conversational format (PIL images and text, no tensors).

Several questions share one image in one sample, because the image tokens are most of the cost. Sample n is a pure
function of (seed, n), so a stream has no state to save.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from unimm.data.shapes import Turn, render, sample_captioned_scene, sample_conversation
from unimm.data.shapes.phrasings import sample_unknown_request, sample_wording
from unimm.data.shapes.things import REFUSAL
from unimm.data.shuffling import Rows
from unimm.errors import UserError

Message = dict[str, Any]
DRAWN_KINDS = ("drawing", "editing")
"""Kinds of flows and tasks whose answer is one image."""


class ShapesConversations:
    """An endless stream of question-and-answer conversations about scenes of the shapes data set.

    Args:
        seed: seed of the stream.
        num_turns: minimum and maximum number of questions about one image.
        kind_shares: share of each kind of question; None uses the data set's own shares.
        phrasing_share: share of the questions in another wording (`unimm.data.shapes.phrasings`).
        unknown_share: share of the conversations that only ask, without an image, to draw what the world does not hold.
    """

    def __init__(
        self,
        seed: int,
        num_turns: tuple[int, int] = (4, 7),
        kind_shares: dict[str, float] | None = None,
        *,
        phrasing_share: float = 0.0,
        unknown_share: float = 0.0,
    ) -> None:
        if not 1 <= num_turns[0] <= num_turns[1]:
            raise UserError(f"num_turns must be [fewest, most] with 1 <= fewest <= most, got {list(num_turns)}.")
        self.seed = seed
        self.num_turns = num_turns
        self.kind_shares = kind_shares
        self.phrasing_share, self.unknown_share = phrasing_share, unknown_share

    def messages(self, index: int) -> list[Message]:
        """Return the messages of sample `index`; the image, if there is one, is part of the first one."""
        words = np.random.default_rng((self.seed, index, 1))  # scenes and questions do not depend on the wordings
        if words.random() < self.unknown_share:
            return [message("user", sample_unknown_request(words)), message("assistant", REFUSAL)]
        rng = np.random.default_rng((self.seed, index))
        num_turns = int(rng.integers(self.num_turns[0], self.num_turns[1] + 1))
        scene, turns = sample_conversation(rng, num_turns=num_turns, kind_shares=self.kind_shares)
        turns = [self._worded(words, turn) for turn in turns]
        return conversation(render(scene), [(turn.question, turn.answer) for turn in turns])

    def _worded(self, rng: np.random.Generator, turn: Turn) -> Turn:
        return sample_wording(rng, turn) if rng.random() < self.phrasing_share else turn


class RowsFlow:
    """A flow backed by rows, with their block layout."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.blocks, self.pool = rows.blocks, rows.pool

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """Return row `index` modulo the number of rows."""
        return self.rows[index % len(self.rows)]


class CaptionedImages(RowsFlow):
    """A captioning flow: the question is always the same, the answer is the caption."""

    def __init__(self, rows: Rows, question: str) -> None:
        super().__init__(rows)
        self.question = question

    def messages(self, index: int) -> list[Message]:
        row = self.row(index)
        return conversation(row["image"], [(self.question, row["text"])])


def message(role: str, text: str) -> Message:
    """Return a text-only message."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def conversation(image: Image.Image, turns: list[tuple[str, str]]) -> list[Message]:
    """Build the messages of (question, answer) turns; the image comes before the first question."""
    messages = [message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    return messages


def shapes_corpus(num_samples: int, seed: int) -> Iterator[str]:
    """Yield shapes text to train a text tokenizer on: captions, questions and answers, each after its role."""
    for index in range(num_samples):
        rng = np.random.default_rng((seed, index))
        yield f"user\n{sample_captioned_scene(rng)[1].prompt}"
        for turn in sample_conversation(rng)[1]:
            yield f"user\n{turn.question}"
            yield f"assistant\n{turn.answer}"
