"""How a small codebook comes into full use and stays there; ours, not the papers'.

It begins at the k-means centres of latents, moves idle and redundant codes while a run is young, and is spread over the
latents once more at the end. Every process does the same: by the same pictures, or by the latents of all processes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.codebook_usage import CodebookUsage
from unimm.training.loop.arguments import TokenizerTrainingConfig


class CodebookUpkeep:
    """Of `tokenizer`'s quantizer; `batches` gives pixel_values of the pictures with these numbers, `num_pictures` how
    many there are."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        config: TokenizerTrainingConfig,
        batches: Callable[[range], Iterator[Tensor]],
        num_pictures: int,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.batches, self.num_pictures = batches, num_pictures
        self.chosen = CodebookUsage(tokenizer.config.codebook_size)  # by all processes since the last revival

    @torch.no_grad()
    def fit(self) -> None:
        """Start from the first pictures, the same on every process."""
        count = min(self.config.codebook_init_pictures, self.num_pictures)
        self.tokenizer.quantizer.fit(torch.cat(self._latents(range(count))), seed=self.config.seed)

    @torch.no_grad()
    def refit(self) -> None:
        """`refit_rounds` rounds, each on other pictures of the stream; the last checkpoint is older and unchanged."""
        count = self.config.codebook_init_pictures
        for number in range(self.config.refit_rounds):
            latents = self._latents(range(number * count, min((number + 1) * count, self.num_pictures)))
            moved = self.tokenizer.quantizer.refit(torch.cat(latents), seed=number) if latents else 0
            print(f"refit round {number + 1}: {moved} codes moved")

    def revive(self, step: int, latents: Tensor) -> None:
        """Give codes that no process chose, and redundant ones, a new place, by the latents [n, C] of all processes.
        Late in a run, from `revive_until` of its steps on, none."""
        counts = self.chosen.counts.to(latents.device)
        self.chosen = CodebookUsage(len(counts))
        if step >= self.config.revive_until * self.config.steps:
            return
        quantizer = self.tokenizer.quantizer
        idle = counts == 0
        if self.config.revive_redundant:
            idle[quantizer.redundant(latents, counts)] = True
        if idle.any():
            quantizer.revive(idle.nonzero().flatten(), latents, seed=step)

    def _latents(self, pictures: range) -> list[Tensor]:
        self.tokenizer.eval()
        return [self.tokenizer.encode(batch).latents.flatten(0, 1) for batch in self.batches(pictures)]
