"""A conversation with a unified model about images: `ChatSession`, and a chat in the terminal."""

from unimm.chat.session import ChatSession
from unimm.chat.terminal import converse
from unimm.chat.turns import ImageLike

__all__ = ["ChatSession", "ImageLike", "converse"]
