"""The pieces of an answer while a thread generates it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


def text_pieces(
    model: Any, tokenizer: Any, arguments: Mapping[str, Any], on_end: Callable[[str], None]
) -> Iterator[str]:
    """Yield pieces of the text that `model.generate(**arguments)` writes; the generation ends with the iterator.

    Args:
        on_end: called with the text so far once the iterator is exhausted or closed, unless the generation failed.

    Raises:
        Exception: what `generate` raises.
    """
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = _Closed()
    failures: list[Exception] = []

    def write() -> None:
        try:
            model.generate(**arguments, streamer=pieces, stopping_criteria=StoppingCriteriaList([closed]))
        except Exception as error:  # raised again in the consumer's thread
            failures.append(error)
            pieces.end()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece)
            if piece:
                yield piece
    finally:
        closed.event.set()
        writer.join()
        if not failures:
            on_end("".join(said))
    if failures:
        raise failures[0]


class _Closed(StoppingCriteria):
    """A stopping criterion that ends generation once the stream is closed."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.new_full((len(input_ids),), self.event.is_set()).bool()
