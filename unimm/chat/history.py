"""The history of a conversation: what fits the model's context, and what is forgotten.

An exchange is a question and its answer. It begins with the history of that moment, and enters the history that is
there when it ends: whatever was asked, drawn or cleared meanwhile stays so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, Literal

from PIL import Image
from transformers import BatchFeature
from transformers.utils import logging

from unimm.chat.turns import content
from unimm.errors import UserError
from unimm.mllm.answering import Conversation, chat_inputs, drop_oldest, system_and_turns

logger = logging.get_logger(__name__)

Overflow = Literal["drop", "refuse"]


@dataclass(frozen=True)
class Exchange:
    """A question, and the oldest turns that are forgotten for it."""

    question: dict[str, Any]
    dropped: Conversation = field(default_factory=list)


class History:
    """The messages of a conversation with a model, and its limits; see `ChatSession`."""

    def __init__(self, model: Any, processor: Any, overflow: Overflow, generation: dict[str, Any]) -> None:
        if overflow not in ("drop", "refuse"):
            raise UserError(f"overflow is {overflow!r}; known are drop and refuse.")
        self.model, self.processor, self.overflow, self.generation = model, processor, overflow, generation
        self.messages: Conversation = []
        self._said_dropped = False

    def reset(self) -> None:
        """Clear the history."""
        self.messages, self._said_dropped = [], False

    def _last_image(self) -> Image.Image | None:
        """Return the last image of the history, shown or generated."""
        for message in reversed(self.messages):
            if not isinstance(message["content"], str):
                for part in reversed(message["content"]):
                    if "image" in part:
                        image: Image.Image = part["image"]
                        return image
        return None

    def _inputs(self, messages: Conversation) -> BatchFeature:
        return chat_inputs(self.model, self.processor, [messages])

    def _begin(self, question: dict[str, Any], room: int) -> tuple[Exchange, BatchFeature]:
        """Return the exchange that this question begins, and the model's inputs: it and as much of the history as fits
        the context beside an answer of `room` tokens, image tokens included."""
        kept = self.messages
        if self.overflow == "drop":
            kept = drop_oldest(self.processor, kept, question, self._context - room)
        _, turns = system_and_turns(self.messages)
        exchange = Exchange(question, turns[: len(self.messages) - len(kept)])
        return exchange, self._inputs([*kept, question])

    @property
    def _context(self) -> int:
        context: int = self.model.config.get_text_config().max_position_embeddings
        return context

    @property
    def _text_room(self) -> int:
        """Return the tokens that are kept free for an answer of text."""
        return min(self.generation["max_new_tokens"], self._context // 8)

    def _room(self, inputs: Mapping[str, Any], needed: int, advice: str) -> int:
        """Return the number of tokens left for the answer; raise UserError if it is less than `needed`."""
        length, context = inputs["input_ids"].shape[1], self._context
        if length + needed > context:
            raise UserError(
                f"This is {length} tokens long, its answer needs {needed} at least, the model reads {context}. {advice}"
            )
        return context - length

    def _remember(self, exchange: Exchange, answer: Sequence[str | Image.Image]) -> None:
        """Add an exchange to the history; forget what it has dropped, unless the history was replaced meanwhile."""
        system, turns = system_and_turns(self.messages)
        count = len(exchange.dropped)
        if len(turns) >= count and all(map(is_, turns, exchange.dropped)):
            turns = turns[count:]
            self._say_dropped(count)
        self.messages = [*system, *turns, exchange.question, {"role": "assistant", "content": content(answer)}]

    def _say_dropped(self, count: int) -> None:
        if count and not self._said_dropped:
            self._said_dropped = True
            logger.warning(
                f"The conversation is longer than the {self._context} tokens that the model reads: its {count} oldest "
                "turns are forgotten, as further ones will be without a word."
            )
