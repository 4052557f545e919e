"""How a small codebook comes into full use and stays there; ours, not the papers'.

It begins at the k-means centres of latents, moves idle and redundant codes while a run is young, and is spread over the
latents once more at the end. Every process does the same: by the same images, or by the latents of all processes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.codebook_usage import CodebookUsage
from unimm.training.loop.arguments import TokenizerTrainingConfig


class CodebookMaintenance:
    """Of `tokenizer`'s quantizer; `batches` gives pixel_values of the images with these numbers, `num_pictures` how
    many there are."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        config: TokenizerTrainingConfig,
        batches: Callable[[range], Iterator[Tensor]],
        num_images: int,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.batches, self.num_images = batches, num_images
        self.chosen = CodebookUsage(tokenizer.config.codebook_size)  # by all processes since the last revival

    @torch.no_grad()
    def fit(self) -> None:
        """Start from the first images, the same on every process."""
        count = min(self.config.codebook_init_images, self.num_images)
        self.tokenizer.quantizer.fit(torch.cat(self._latents(range(count))), seed=self.config.seed)

    @torch.no_grad()
    def reestimate(self) -> None:
        """Spread the codes in rounds, each on other images of the stream; the last checkpoint stays as it is."""
        count = self.config.codebook_init_images
        for number in range(self.config.reestimation_rounds):
            latents = self._latents(range(number * count, min((number + 1) * count, self.num_images)))
            moved = self.tokenizer.quantizer.reestimate(torch.cat(latents), seed=number) if latents else 0
            print(f"reestimate round {number + 1}: {moved} codes moved")

    def restart(self, step: int, latents: Tensor) -> None:
        """Give codes that no process chose, and redundant ones, a new place, by the latents [n, C] of all processes.
        Late in a run, from `restart_until` of its steps on, none."""
        counts = self.chosen.counts.to(latents.device)
        self.chosen = CodebookUsage(len(counts))
        if step >= self.config.restart_until * self.config.steps:
            return
        quantizer = self.tokenizer.quantizer
        idle = counts == 0
        if self.config.restart_redundant:
            idle[quantizer.redundant(latents, counts)] = True
        if idle.any():
            quantizer.restart(idle.nonzero().flatten(), latents, seed=step)

    def _latents(self, images: range) -> list[Tensor]:
        self.tokenizer.eval()
        return [self.tokenizer.encode(batch).latents.flatten(0, 1) for batch in self.batches(images)]
