"""The sampling loop of image ids: guidance, warpers and noise, one token at a time or several in parallel.

Several in parallel is speculative Jacobi decoding (https://arxiv.org/abs/2410.01699): guess the next tokens, run one
forward over the guesses, and keep those that match the model's own choices. The noise of a position is fixed beforehand
(https://arxiv.org/abs/2510.24211), so a choice is a function of the tokens before it, and the ids are the same as with
one at a time. Forced tokens are guesses that are always right: a run of them is read in one forward. S sequences,
G <= S guided ones, M image tokens, n of them at once, K codes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from unimm.errors import UserError, one_line
from unimm.mllm.choice import Choice, Chosen, Inputs, precise
from unimm.mllm.decoding import RoomyLayer, Steps
from unimm.mllm.guidance import Guidance
from unimm.noise import Noise
from unimm.sampling import ImageSampling

Step: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor]
"""Guided logits [S, K], scores [S, K] and token ids [S] of one image token."""

_FIRST, _WIDEST = 8, 32  # window of "auto": initial and maximum; it tracks three times the accepted tokens


class Drawing:
    """The sampling loop for S images, started from the logits [R, K] of their first token: the rows of the sequences,
    then those of the other sides of guidance.

    Args:
        forced: token ids [S, M] that are kept, -1 for those to sample; None samples all.
        every_step: compute the logits of every token, also where all are forced.
    """

    def __init__(
        self,
        logits: Tensor,
        steps: Steps,
        guidance: Guidance,
        noise: Noise | None,
        sampling: ImageSampling,
        base: int,
        forced: Tensor | None = None,
        every_step: bool = False,
    ) -> None:
        self.steps, self.noise, self.first = steps, noise, logits[:, None]  # [R, 1, K]
        guidance = guidance.to(precise(logits))
        self.choice = Choice(guidance, sampling, base)
        (self.length, self.size), self.last = guidance.scales.shape, guidance.last
        self.fed = torch.arange(self.size, device=logits.device)  # the sequence that each row continues
        if len(guidance.rows):
            self.fed = torch.cat([self.fed, *[guidance.rows] * guidance.sides])
        forced = torch.full((self.size, self.length), -1) if forced is None else forced
        self.forced, self.every_step = forced.to(logits.device), every_step
        self.runs = _runs((forced >= 0).all(0).tolist())
        self.chosen = self.forced.clamp_min(base)  # filled token by token; forced tokens are there from the start

    @property
    def can_forget(self) -> bool:
        """Return whether the cache supports removing rejected guesses."""
        return all(type(layer) is RoomyLayer for layer in self.steps.cache.layers)

    def run(self, parallel_tokens: int | Literal["auto"]) -> Iterator[Step]:
        """Yield guided logits [S, K], scores [S, K] and token ids [S] for each token; fills `chosen` [S, M].

        Without `every_step`, logits and scores are None for tokens that are forced in every sequence.
        """
        width = _FIRST if parallel_tokens == "auto" else parallel_tokens
        done, guesses = 0, self.chosen[:, :0]
        raw, scores, ids = self.choice(self.first, *self._inputs(0, 1))
        while done < self.length:
            right = 1
            if guesses.shape[1]:  # accept a token if all guesses before it are right, in every row
                right += int((ids[:, :-1] == guesses).all(0).long().cumprod(0).sum())
                if right < ids.shape[1]:
                    self.steps.forget(ids.shape[1] - right)
            self.chosen[:, done : done + right] = ids[:, :right]
            for n in range(right):
                yield raw[:, n], scores[:, n], ids[:, n]
            if parallel_tokens == "auto":
                width = min(max((width + 3 * right) // 2, 2), _WIDEST)
            done += right
            if done < self.length:
                known = self.runs[done] if self.steps.takes_many else 0
                # a window must not cross the last guided step: the unconditional rows are dropped there
                room = min(known + width, (self.last + 1 if done <= self.last else self.length) - done)
                skipped = 0 if self.every_step else min(known, room - 1 if done + known < self.length else known)
                for n in range(done, done + skipped):
                    yield None, None, self.chosen[:, n]
                if done + skipped < self.length:
                    guesses = self._guesses(done, room - 1, ids[:, right:], ids[:, -1:])
                    fed = torch.cat([self.chosen[:, done - 1 : done], guesses], dim=1)
                    raw, scores, ids = self._go_on(done, fed, room - skipped)
                    guesses = guesses[:, skipped:]
                done += skipped

    def _guesses(self, done: int, count: int, rejected: Tensor, last: Tensor) -> Tensor:
        """Return guesses [S, count] of the tokens starting at `done`: the forced ones, and for the others the choices
        that were rejected, then the last one repeated."""
        ahead = torch.cat([rejected, last.expand(-1, max(count, 0))], dim=1)[:, :count]
        forced = self.forced[:, done : done + count]
        return torch.where(forced >= 0, forced, ahead)

    def _inputs(self, start: int, stop: int) -> Inputs:
        """Return what the choice of the tokens start..stop-1 takes beside the logits."""
        noise = None if self.noise is None else self.noise.next(start, stop)
        return self.choice.inputs(start, stop, self.forced[:, start:stop], noise)

    def _go_on(self, done: int, token_ids: Tensor, needed: int) -> Chosen:
        """Feed token_ids [S, n], the last chosen one and those from `done` on, to the sequences and to the other sides
        of the guided ones; choose the tokens after the last `needed` of them."""
        if done > self.last and len(self.fed) > self.size:  # no guided steps are left: drop the unconditional rows
            self.fed = self.fed[: self.size]
            self.steps.keep(self.fed)
        stop = done + token_ids.shape[1]
        return self.steps.choose(token_ids[self.fed], needed, self.choice, self._inputs(stop - needed, stop))


def _runs(forced: list[bool]) -> list[int]:
    """Return for each token how many from there on are forced, without a gap."""
    runs = [0]
    for each in reversed(forced):
        runs.append(runs[-1] + 1 if each else 0)
    return runs[:0:-1]


def check_parallel_tokens(tokens: int | str, compiled: bool) -> None:
    """Raise UserError for an invalid number of parallel tokens."""
    if tokens != "auto" and not (isinstance(tokens, int) and tokens >= 1):
        raise UserError(f'parallel_tokens is {tokens!r}; give 1 for one at a time, a larger number, or "auto"')
    if compiled and tokens != 1:
        raise UserError(
            f"compile=True draws one token at a time and parallel_tokens is {tokens!r}: leave one of them out"
        )


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise what `generate` refuses as a UserError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"Cannot draw: {one_line(error)}.") from error


def warn(reason: str) -> None:
    """Warn that image generation falls back to a slower way."""
    warnings.warn(f"Drawing goes on in a slower way: {reason}", stacklevel=2)
