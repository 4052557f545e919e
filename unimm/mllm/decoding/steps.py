"""What every decoder of image tokens does.

R rows, T tokens so far, S sequences, K codes.
"""

from abc import ABC, abstractmethod

from torch import Tensor
from transformers import Cache

from unimm.mllm.choice import Choice, Chosen, Inputs


class Steps(ABC):
    """A decoder of image tokens for a batch of rows, after the prompt."""

    cache: Cache

    @property
    def takes_many(self) -> bool:
        """Return whether several tokens can be fed at once."""
        return True

    @abstractmethod
    def logits(self, token_ids: Tensor, needed: int) -> Tensor:
        """Feed the next n image tokens of each row, token_ids [R, n]; return the logits [R, needed, K] after the last
        `needed` of them."""

    def choose(self, token_ids: Tensor, needed: int, choice: Choice, inputs: Inputs) -> Chosen:
        """Feed token_ids as `logits` does, and choose the tokens after the last `needed` of them: logits and scores
        [S, needed, K], and token ids [S, needed]."""
        return choice(self.logits(token_ids, needed), *inputs)

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Continue with these rows [R'] only."""

    @abstractmethod
    def forget(self, tokens: int) -> None:
        """Remove the last `tokens` tokens."""
