"""Codebook maintenance, which keeps all codes of a small codebook in use; ours, not the papers'.

The codebook is initialized at the k-means centers of latents, dead and redundant codes are restarted during the first
part of a run, and the codebook is re-estimated at the end. Every process computes the same result, from the same
images or from the gathered latents of all processes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm.errors import UserError
from unimm.tokenizer import ImageTokenizer
from unimm.tokenizer.codebook_usage import CodebookUsage
from unimm.tokenizer.quantizers import Quantizer
from unimm.tokenizer.search import nearest_codes
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
        # by all processes since the last restart
        self.chosen = CodebookUsage(tokenizer.config.codebook_size, tokenizer.device)

    @torch.no_grad()
    def fit(self) -> None:
        """Initialize the codebook by k-means on the first images, the same on every process."""
        count = min(self.config.codebook_init_images, self.num_images)
        fit_codes(self.tokenizer.quantizer, torch.cat(self._latents(range(count))), seed=self.config.seed)

    @torch.no_grad()
    def reestimate(self) -> None:
        """Re-estimate the codes in rounds, each on other images of the stream; the last checkpoint stays as it is."""
        count = self.config.codebook_init_images
        for number in range(self.config.reestimation_rounds):
            latents = self._latents(range(number * count, min((number + 1) * count, self.num_images)))
            moved = reestimate_codes(self.tokenizer.quantizer, torch.cat(latents), seed=number) if latents else 0
            print(f"reestimate round {number + 1}: {moved} codes moved")

    def restart(self, step: int, latents: Tensor) -> None:
        """Move dead codes, which no process used, and redundant ones to latents [n, C] of all processes; do nothing
        from the share `restart_until` of the run's steps on."""
        counts = self.chosen.counts.to(latents.device)
        self.chosen = CodebookUsage(len(counts), counts.device)
        if step >= self.config.restart_until * self.config.steps:
            return
        quantizer = self.tokenizer.quantizer
        idle = counts == 0
        if self.config.restart_redundant:
            idle[redundant_codes(quantizer, latents, counts)] = True
        if idle.any():
            restart_codes(quantizer, idle.nonzero().flatten(), latents, seed=step)

    def _latents(self, images: range) -> list[Tensor]:
        self.tokenizer.eval()
        return [self.tokenizer.encode(batch).latents.flatten(0, 1) for batch in self.batches(images)]


@torch.no_grad()
def fit_codes(quantizer: Quantizer, latents: Tensor, iterations: int = 10, seed: int = 0) -> None:
    """Initialize from data: set the codes to the k-means centers of `latents` [n, C].

    A small codebook then starts with every code in use. Raises UserError if n < K.
    """
    size = len(quantizer.codebook)
    if len(latents) < size:
        raise UserError(f"{len(latents)} latents cannot fill a codebook of {size} codes; give more images.")
    generator = torch.Generator().manual_seed(seed)
    latents = quantizer.comparable(latents.detach())
    centers = latents[torch.randperm(len(latents), generator=generator)[:size].to(latents.device)].clone()
    for _ in range(iterations):
        ids = nearest_codes(latents, centers)
        counts = torch.bincount(ids, minlength=size)
        sums = torch.zeros_like(centers).index_add_(0, ids, latents)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
        centers = quantizer.comparable(centers)
    quantizer.adopt(centers)


@torch.no_grad()
def restart_codes(quantizer: Quantizer, dead: Tensor, latents: Tensor, seed: int = 0) -> None:
    """Restart the codes `dead` [n] at latents [m, C] with a large quantization error.

    The latents are sampled with replacement from the half with the largest errors, so the new codes vary.
    """
    latents = latents.detach().float()
    _, errors = _nearest(quantizer, latents)
    worst = errors.topk(max(1, len(latents) // 2)).indices
    generator = torch.Generator().manual_seed(seed)
    chosen = worst[torch.randint(len(worst), (len(dead),), generator=generator).to(worst.device)]
    quantizer.move(dead, latents[chosen])


@torch.no_grad()
def redundant_codes(quantizer: Quantizer, latents: Tensor, counts: Tensor) -> Tensor:
    """Return the indices [n] of codes that a more frequent code can replace.

    Two codes are redundant if their squared distance is below the mean quantization error of the worse half of
    `latents` [m, C]: they split what one code could cover while other latents have no close code. `counts` [K] is how
    often each code was chosen.
    """
    _, errors = _nearest(quantizer, latents)
    return _replaceable(quantizer, counts, _radius(errors)).nonzero().flatten()


@torch.no_grad()
def reestimate_codes(quantizer: Quantizer, latents: Tensor, seed: int = 0) -> int:
    """Move unused and redundant codes onto latents [m, C] with an error above the radius of `redundant_codes`.

    All else is unchanged. Repeated on fresh latents it spreads the codes evenly over the latents' support, whatever
    their frequency. Returns how many codes moved.
    """
    ids, errors = _nearest(quantizer, latents)
    counts = torch.bincount(ids, minlength=len(quantizer.codebook))
    radius = _radius(errors)
    idle = ((counts == 0) | _replaceable(quantizer, counts, radius)).nonzero().flatten()
    far = (errors > radius).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = far[torch.randperm(len(far), generator=generator)[: len(idle)].to(ids.device)]
    idle = idle[: len(chosen)]
    quantizer.move(idle, latents.detach().float()[chosen])
    return len(idle)


def _nearest(quantizer: Quantizer, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the id and the squared quantization error of each of the latents [m, C], both [m]."""
    flat, table = quantizer.comparable(latents.detach()), quantizer.effective_codebook
    ids = nearest_codes(flat, table)
    return ids, (flat - F.embedding(ids, table)).square().sum(dim=1)


def _replaceable(quantizer: Quantizer, counts: Tensor, radius: Tensor) -> Tensor:
    """Return the mask [K] of codes with a more frequent code (ties: lower index) within `radius` (squared)."""
    table = quantizer.effective_codebook
    order, counts = torch.arange(len(table), device=table.device), counts.to(table.device)
    more = (counts[None] > counts[:, None]) | ((counts[None] == counts[:, None]) & (order[None] < order[:, None]))
    return (more & (torch.cdist(table, table).square() < radius)).any(dim=1)


def _radius(errors: Tensor) -> Tensor:
    """Return the mean of the larger half of the squared errors."""
    return errors.topk(max(1, len(errors) // 2)).values.mean()
