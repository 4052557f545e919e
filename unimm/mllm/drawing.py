"""The choice of image ids: guidance, warpers, noise, one token after another or several guessed and confirmed at once.

Several at once is Jacobi decoding (https://arxiv.org/abs/2410.01699): the next tokens are guessed, one forward goes
over the guesses, and as many of them are kept as are what the model chooses there. The noise of a position is fixed
beforehand (https://arxiv.org/abs/2510.24211), so the choice is a function of what stands before it, and the ids are
those of one at a time. S sequences, G <= S guided ones, M image tokens, n of them at once, K codes.
"""

import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from unimm.errors import UserError
from unimm.mllm.decoding import RoomyLayer, Steps
from unimm.sampling import ImageSampling, Noise

_FIRST, _WIDEST = 8, 32  # tokens at once that "auto" begins with, and at most; it follows three times the right ones


class Drawing:
    """Draws S images from the logits [S + G, K] of their first token: the sequences, then the unconditional rows."""

    def __init__(
        self, logits: Tensor, steps: Steps, scales: Tensor, noise: Noise | None, sampling: ImageSampling, base: int
    ) -> None:
        self.steps, self.noise, self.warpers, self.base = steps, noise, sampling.warpers(), base
        self.logits = _precise(logits)[:, None]  # [S + G, n, K]
        self.length, self.size = scales.shape
        guided_steps = (scales > 0).any(1).nonzero()
        self.last = int(guided_steps[-1]) if len(guided_steps) else -1  # the last guided step
        self.uniform = bool((scales[: self.last + 1] > 0).all())  # every row, up to there
        self.guided = (scales > 0).any(0).nonzero()[:, 0].to(logits.device)  # [G]
        self.scales = scales.t()[..., None].to(self.logits)  # [S, M, 1]
        self.chosen = torch.full((self.size, self.length), base, device=logits.device)

    @property
    def can_forget(self) -> bool:
        """Whether guesses can be taken back."""
        return all(type(layer) is RoomyLayer for layer in self.steps.cache.layers)

    def run(self, parallel_tokens: int | Literal["auto"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits [S, K] after guidance, scores [S, K] and token ids [S], token by token; `chosen` [S, M] fills up."""
        width = _FIRST if parallel_tokens == "auto" else parallel_tokens
        done, guesses = 0, self.chosen[:, :0]
        while done < self.length:
            raw, scores, ids = self._choose(done)
            right = 1
            if guesses.shape[1]:  # a token is right if all before it were guessed right, in every row
                right += int((ids[:, :-1] == guesses).all(0).long().cumprod(0).sum())
                self.steps.forget(ids.shape[1] - right)
            self.chosen[:, done : done + right] = ids[:, :right]
            for n in range(right):
                yield raw[:, n], scores[:, n], ids[:, n]
            if parallel_tokens == "auto":
                width = min(max((width + 3 * right) // 2, 2), _WIDEST)
            done += right
            if done < self.length:
                room = min(width, (self.last + 1 if done <= self.last else self.length) - done)
                ahead = torch.cat(
                    [ids[:, right:], ids[:, -1:].expand(-1, room)], dim=1
                )  # what was seen there, repeated
                guesses = ahead[:, : room - 1]
                self._go_on(done, torch.cat([self.chosen[:, done - 1 : done], guesses], dim=1))

    def _choose(self, done: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and scores [S, n, K] of the tokens from `done` on, and the token ids [S, n]."""
        raw = self._guide(done)
        scores = self.warpers(self.chosen, raw.flatten(0, 1)).view_as(raw)  # the warpers look at the scores alone
        noisy = scores if self.noise is None else scores + self.noise.next(done, done + raw.shape[1])
        return raw, scores, noisy.argmax(-1) + self.base

    def _guide(self, done: int) -> Tensor:
        conditional, unconditional = self.logits[: self.size], self.logits[self.size :]
        if done > self.last:
            return conditional
        scale = self.scales[:, done : done + conditional.shape[1]]  # [S, n, 1]
        if self.uniform:
            return unconditional + scale * (conditional - unconditional)
        given, scale = conditional[self.guided], scale[self.guided]
        pulled = torch.where(scale > 0, unconditional + scale * (given - unconditional), given)
        return conditional.index_copy(0, self.guided, pulled)

    def _go_on(self, done: int, token_ids: Tensor) -> None:
        """Feed token_ids [S, n] to the sequences and to the unconditional side of the guided ones."""
        if done > self.last and len(self.guided):  # the rest needs no unconditional rows
            self.steps.keep(torch.arange(self.size, device=token_ids.device))
            self.guided = self.guided[:0]
        fed = torch.cat([token_ids, token_ids[self.guided]]) if len(self.guided) else token_ids
        self.logits = _precise(self.steps.logits(fed))


def check_parallel_tokens(tokens: int | str, compiled: bool) -> None:
    """Raise UserError for a number of tokens at once that cannot be."""
    if tokens != "auto" and not (isinstance(tokens, int) and tokens >= 1):
        raise UserError(f'parallel_tokens is {tokens!r}; give 1 for one at a time, a larger number, or "auto"')
    if compiled and tokens != 1:
        raise UserError(
            f"compile=True draws one token at a time and parallel_tokens is {tokens!r}: leave one of them out"
        )


def _precise(logits: Tensor) -> Tensor:
    """Logits in at least float32, in which guidance and noise are computed."""
    return logits if logits.dtype == torch.float64 else logits.float()


def warn(reason: str) -> None:
    """Say that drawing goes on in a slower way."""
    warnings.warn(f"Drawing goes on in a slower way: {reason}", stacklevel=2)
