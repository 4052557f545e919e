"""Codebook maintenance, which keeps all codes of a small codebook in use; ours, not the papers'.

The codebook is initialized at the k-means centers of latents, dead and redundant codes are restarted during the first
part of a run, and the codebook is re-estimated at the end. Every process computes the same result, from the same
images or from the gathered latents of all processes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.codebook_usage import CodebookUsage
from unimm.training.loop.arguments import TokenizerTrainingConfig


class CodebookMaintenance:
    """Initialize, restart and re-estimate the codes of `tokenizer`'s quantizer; `batches` yields the pixel_values of
    the images with given indices, of which there are `num_images`."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        config: TokenizerTrainingConfig,
        batches: Callable[[range], Iterator[Tensor]],
        num_images: int,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.batches, self.num_images = batches, num_images
        self.chosen = CodebookUsage(tokenizer.config.codebook_size)  # by all processes since the last restart

    @torch.no_grad()
    def fit(self) -> None:
        """Initialize the codebook by k-means on the first images, the same on every process."""
        count = min(self.config.codebook_init_images, self.num_images)
        self.tokenizer.quantizer.fit(torch.cat(self._latents(range(count))), seed=self.config.seed)

    @torch.no_grad()
    def reestimate(self) -> None:
        """Re-estimate the codes in rounds, each on other images of the stream; the last checkpoint stays as it is."""
        count = self.config.codebook_init_images
        for number in range(self.config.reestimation_rounds):
            latents = self._latents(range(number * count, min((number + 1) * count, self.num_images)))
            moved = self.tokenizer.quantizer.reestimate(torch.cat(latents), seed=number) if latents else 0
            print(f"reestimate round {number + 1}: {moved} codes moved")

    def restart(self, step: int, latents: Tensor) -> None:
        """Move dead codes, which no process used, and redundant ones to latents [n, C] of all processes; do nothing
        from the share `restart_until` of the run's steps on."""
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
