"""SimVQ: vector quantization whose whole codebook moves at every step (arXiv 2411.02038).

The codebook is Q = C W: C is drawn once and stays, W is learned. Every row moves when W moves, the unused ones too, so
the codebook does not collapse. Special here:

- the search is done in float32 with autocast off, in chunks: the K scores of every token never exist at once;
- `lookup` applies W (the published code forgets it) and is the very operation that `forward` uses, so decoding ids
  gives the same bits;
- codes are gathered with `F.embedding`: the backward of plain indexing is not deterministic on the CPU.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.errors import UserError
from unimm.tokenizer.precision import Float32Module

SEARCH_BYTES = 2**26  # largest block of scores, 64 MiB


@dataclass
class QuantizerOutput:
    """codes [B, M, C] (with the straight-through gradient where gradients are on), ids [B, M], scalar losses."""

    codes: Tensor
    ids: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest row of `codebook` [K, C] for each latent [..., C], by Euclidean distance; ties go to the
    lowest index."""
    flat = latents.detach().reshape(-1, latents.shape[-1]).float()
    table = codebook.detach().float()
    half_norms = table.square().sum(dim=1) / 2
    rows = max(1, SEARCH_BYTES // (4 * len(table)))
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        # argmin |z - q|^2 = argmin |q|^2 / 2 - z.q
        ids = [torch.addmm(half_norms, chunk, table.t(), alpha=-1).argmin(dim=1) for chunk in flat.split(rows)]
    return torch.cat(ids).reshape(latents.shape[:-1])


class SimVQ(Float32Module):
    """`codebook` is C [K, C], a persistent buffer; `projection` is W."""

    def __init__(self, codebook_size: int, codebook_dim: int, bias: bool = False, train_codebook: bool = False) -> None:
        super().__init__()
        rows = torch.randn(codebook_size, codebook_dim) * codebook_dim**-0.5
        if train_codebook:
            self.codebook = nn.Parameter(rows)
        else:
            self.register_buffer("codebook", rows)
        self.projection = nn.Linear(codebook_dim, codebook_dim, bias=bias)

    @property
    def effective_codebook(self) -> Tensor:
        """Q = C W, [K, C] in float32, differentiable with respect to W."""
        with torch.autocast(self.codebook.device.type, enabled=False):
            return self.projection(self.codebook)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """latents [B, M, C] -> the nearest codes, and the two terms of the quantization loss (means over all elements).

        The codebook term moves W only, the commitment term the latents only; the reconstruction's gradient passes to
        the latents and not to W (VQRAE, section 3.4).
        """
        latents = latents.float()
        table = self.effective_codebook
        ids = nearest_codes(latents, table)
        codes = F.embedding(ids, table)
        codebook_loss = F.mse_loss(codes, latents.detach())
        commitment_loss = F.mse_loss(latents, codes.detach())
        out = codes.detach()
        if torch.is_grad_enabled() and latents.requires_grad:
            out = latents + (out - latents).detach()
        return QuantizerOutput(out, ids, codebook_loss, commitment_loss)

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes of ids [B, M] -> [B, M, C]. Raises UserError for an id outside the codebook."""
        size = len(self.codebook)
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < size):
            raise UserError(f"Image ids run from 0 to {size - 1}; these run from {int(ids.min())} to {int(ids.max())}.")
        return F.embedding(ids, self.effective_codebook)

    @torch.no_grad()
    def fit(self, latents: Tensor, iterations: int = 10, seed: int = 0) -> None:
        """Start from data: C becomes the k-means centres of `latents` [n, C], and W the identity.

        Ours, not the paper's: on a small codebook it starts with every code in use. Needs at least K latents.
        """
        size, width = self.codebook.shape
        if len(latents) < size:
            raise UserError(f"{len(latents)} latents cannot fill a codebook of {size} codes; give more pictures.")
        generator = torch.Generator().manual_seed(seed)
        latents = latents.float()
        centres = latents[torch.randperm(len(latents), generator=generator)[:size].to(latents.device)].clone()
        for _ in range(iterations):
            ids = nearest_codes(latents, centres)
            counts = torch.bincount(ids, minlength=size)
            sums = torch.zeros_like(centres).index_add_(0, ids, latents)
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        self.codebook.copy_(centres)
        self.projection.weight.copy_(torch.eye(width))
        if self.projection.bias is not None:
            self.projection.bias.zero_()

    @torch.no_grad()
    def redundant(self, latents: Tensor, counts: Tensor) -> Tensor:
        """The codes that another, more frequent one stands in for (ours, not the paper's): indices [n].

        Two codes that are closer to each other than the error that they leave on the worse-served half of `latents`
        [m, C] tell apart what needs no telling apart while others go without. `counts` [K]: how often each was chosen.
        """
        _, errors = self._served(latents)
        return self._stood_in_for(counts, _radius(errors)).nonzero().flatten()

    @torch.no_grad()
    def refit(self, latents: Tensor, seed: int = 0) -> int:
        """Move idle and redundant codes onto latents [m, C] that are served worse than `redundant`'s radius (ours).

        For a trained tokenizer: encoder and W stay. Repeated on fresh latents it spreads the codes evenly over what
        occurs, however often it occurs. Returns how many codes moved.
        """
        ids, errors = self._served(latents)
        counts = torch.bincount(ids, minlength=len(self.codebook))
        radius = _radius(errors)
        idle = ((counts == 0) | self._stood_in_for(counts, radius)).nonzero().flatten()
        badly_served = (errors > radius).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        chosen = badly_served[torch.randperm(len(badly_served), generator=generator)[: len(idle)].to(ids.device)]
        idle = idle[: len(chosen)]
        self._move(idle, latents.detach().float()[chosen])
        return len(idle)

    def _served(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The id and the squared error of each of the latents [m, C]."""
        flat, table = latents.detach().float(), self.effective_codebook
        ids = nearest_codes(flat, table)
        return ids, (flat - F.embedding(ids, table)).square().sum(dim=1)

    def _stood_in_for(self, counts: Tensor, radius: Tensor) -> Tensor:
        """Mask [K] of the codes with a more frequent one within `radius` (squared)."""
        table = self.effective_codebook
        order, counts = torch.arange(len(table), device=table.device), counts.to(table.device)
        more = (counts[None] > counts[:, None]) | ((counts[None] == counts[:, None]) & (order[None] < order[:, None]))
        return (more & (torch.cdist(table, table).square() < radius)).any(dim=1)

    def _move(self, codes: Tensor, targets: Tensor) -> None:
        """Give the codes [n] rows of C that W maps onto `targets` [n, C]."""
        targets = targets - (0 if self.projection.bias is None else self.projection.bias)
        # In float64, so that the last bit of the float32 result does not depend on where the tensors lie in memory.
        solution = torch.linalg.lstsq(self.projection.weight.double(), targets.double().t()).solution
        self.codebook[codes] = solution.t().to(self.codebook.dtype)

    @torch.no_grad()
    def revive(self, dead: Tensor, latents: Tensor, seed: int = 0) -> None:
        """Move the codes `dead` [n] onto latents [m, C] that the codebook serves badly (ours, not the paper's).

        W stays: C's rows become those that W maps there. Of the worst-served half a random choice is taken, so that the
        new codes differ.
        """
        latents = latents.detach().float()
        _, errors = self._served(latents)
        worst = errors.topk(max(1, len(latents) // 2)).indices
        generator = torch.Generator().manual_seed(seed)
        chosen = worst[torch.randint(len(worst), (len(dead),), generator=generator).to(worst.device)]
        self._move(dead, latents[chosen])


def _radius(errors: Tensor) -> Tensor:
    """The mean squared error of the worse-served half."""
    return errors.topk(max(1, len(errors) // 2)).values.mean()
