"""Vector quantizers: latents [B, M, C] to the nearest rows of a codebook [K, C], and ids back to them.

- `SimVQ` (arXiv 2411.02038, VQRAE): the codebook is Q = C W, where C is drawn once and stays and W is learned. Every
  row moves when W moves, the unused ones too, so the codebook does not collapse.
- `NormalizedVQ` (LlamaGen, arXiv 2406.06525; VFMTok, IDEAL): a few dimensions, codes and latents of length 1.

Special here:

- the search is exact (`tokenizer.search`), autocast or not;
- `lookup` is the very operation that `forward` uses, W and length included (SimVQ's published code forgets W), so
  decoding ids gives the same bits;
- codes are gathered with `F.embedding`: the backward of plain indexing is not deterministic on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from unimm.errors import UserError
from unimm.tokenizer.layers import OwnStart
from unimm.tokenizer.precision import Float32Module
from unimm.tokenizer.search import nearest_codes


@dataclass
class QuantizerOutput:
    """codes [B, M, C] (with the straight-through gradient where gradients are on), ids [B, M], scalar losses."""

    codes: Tensor
    ids: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def _itself(value: Tensor) -> Tensor:
    return value


def code_entropy(
    latents: Tensor, codebook: Tensor, temperature: float, *, share: Callable[[Tensor], Tensor] = _itself
) -> Tensor:
    """The entropy term of latents [..., C] over a codebook [K, C]: H of one latent's codes, averaged, minus H of the
    average, where p = softmax(-|z - q|^2 / temperature) (LlamaGen's code, which IDEAL follows).

    Low where every latent is sure of its code and all codes are in use; between -ln K and 0. `share` averages the [K]
    shares of the codes over the processes of a run.
    """
    flat = latents.reshape(-1, latents.shape[-1]).float()
    with torch.autocast(flat.device.type, enabled=False):
        distances = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.t()
        log_p = F.log_softmax(-distances / temperature, dim=1)
    average = share(log_p.exp().mean(0))
    return -(log_p.exp() * log_p).sum(1).mean() + (average * (average + 1e-5).log()).sum()


class Quantizer(Float32Module, OwnStart):
    """What all quantizers do; a subclass says what its codebook is, how latents compare with it and how a code moves.

    `codebook` is what is stored, [K, C]; `effective_codebook` what latents are compared with.
    """

    codebook: Tensor

    @property
    def effective_codebook(self) -> Tensor:
        """[K, C] in float32, differentiable."""
        raise NotImplementedError

    def comparable(self, latents: Tensor) -> Tensor:
        """Latents [..., C] as they are compared with `effective_codebook`, in float32."""
        return latents.float()

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """latents [B, M, C] -> the nearest codes, and the two terms of the quantization loss (means over all elements).

        The codebook term moves the codebook only, the commitment term the latents only; the reconstruction's gradient
        passes to the latents and not to the codebook (VQRAE, section 3.4).
        """
        latents = self.comparable(latents)
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

    def entropy(self, latents: Tensor, temperature: float, *, share: Callable[[Tensor], Tensor] = _itself) -> Tensor:
        """`code_entropy` of latents [B, M, C] over this codebook."""
        return code_entropy(self.comparable(latents), self.effective_codebook, temperature, share=share)

    @torch.no_grad()
    def fit(self, latents: Tensor, iterations: int = 10, seed: int = 0) -> None:
        """Start from data: the codes become the k-means centres of `latents` [n, C].

        Ours, not the paper's: on a small codebook it starts with every code in use. Needs at least K latents.
        """
        size = len(self.codebook)
        if len(latents) < size:
            raise UserError(f"{len(latents)} latents cannot fill a codebook of {size} codes; give more images.")
        generator = torch.Generator().manual_seed(seed)
        latents = self.comparable(latents.detach())
        centres = latents[torch.randperm(len(latents), generator=generator)[:size].to(latents.device)].clone()
        for _ in range(iterations):
            ids = nearest_codes(latents, centres)
            counts = torch.bincount(ids, minlength=size)
            sums = torch.zeros_like(centres).index_add_(0, ids, latents)
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
            centres = self.comparable(centres)
        self.adopt(centres)

    def adopt(self, codes: Tensor) -> None:
        """Make `codes` [K, C] the effective codebook."""
        self.codebook.copy_(codes)

    @torch.no_grad()
    def redundant(self, latents: Tensor, counts: Tensor) -> Tensor:
        """The codes that another, more frequent one stands in for (ours, not the paper's): indices [n].

        Two codes that are closer to each other than the error that they leave on the worse-served half of `latents`
        [m, C] tell apart what needs no telling apart while others go without. `counts` [K]: how often each was chosen.
        """
        _, errors = self._served(latents)
        return self._stood_in_for(counts, _radius(errors)).nonzero().flatten()

    @torch.no_grad()
    def reestimate(self, latents: Tensor, seed: int = 0) -> int:
        """Move idle and redundant codes onto latents [m, C] that are served worse than `redundant`'s radius (ours).

        For a trained tokenizer: everything else stays. Repeated on fresh latents it spreads the codes evenly over what
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
        flat, table = self.comparable(latents.detach()), self.effective_codebook
        ids = nearest_codes(flat, table)
        return ids, (flat - F.embedding(ids, table)).square().sum(dim=1)

    def _stood_in_for(self, counts: Tensor, radius: Tensor) -> Tensor:
        """Mask [K] of the codes with a more frequent one within `radius` (squared)."""
        table = self.effective_codebook
        order, counts = torch.arange(len(table), device=table.device), counts.to(table.device)
        more = (counts[None] > counts[:, None]) | ((counts[None] == counts[:, None]) & (order[None] < order[:, None]))
        return (more & (torch.cdist(table, table).square() < radius)).any(dim=1)

    def _move(self, codes: Tensor, targets: Tensor) -> None:
        """Make the effective codes with these indices [n] equal to `targets` [n, C]."""
        self.codebook[codes] = self.comparable(targets).to(self.codebook.dtype)

    @torch.no_grad()
    def restart(self, dead: Tensor, latents: Tensor, seed: int = 0) -> None:
        """Move the codes `dead` [n] onto latents [m, C] that the codebook serves badly (ours, not the paper's).

        Of the worst-served half a random choice is taken, so that the new codes differ.
        """
        latents = latents.detach().float()
        _, errors = self._served(latents)
        worst = errors.topk(max(1, len(latents) // 2)).indices
        generator = torch.Generator().manual_seed(seed)
        chosen = worst[torch.randint(len(worst), (len(dead),), generator=generator).to(worst.device)]
        self._move(dead, latents[chosen])


class SimVQ(Quantizer):
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

    def start(self) -> None:
        init.normal_(self.codebook, std=self.codebook.shape[1] ** -0.5)
        init.kaiming_uniform_(self.projection.weight, a=5**0.5)

    def adopt(self, codes: Tensor) -> None:
        """C becomes `codes` [K, C], and W the identity."""
        self.codebook.copy_(codes)
        self.projection.weight.copy_(torch.eye(codes.shape[1]))
        if self.projection.bias is not None:
            self.projection.bias.zero_()

    def _move(self, codes: Tensor, targets: Tensor) -> None:
        """Give the codes [n] rows of C that W, which stays, maps onto `targets` [n, C]."""
        targets = targets - (0 if self.projection.bias is None else self.projection.bias)
        # In float64, so that the last bit of the float32 result does not depend on where the tensors lie in memory.
        solution = torch.linalg.lstsq(self.projection.weight.double(), targets.double().t()).solution
        self.codebook[codes] = solution.t().to(self.codebook.dtype)


class NormalizedVQ(Quantizer):
    """`codebook` [K, C] is learned by the codebook and entropy terms; rows and latents are compared at length 1."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(F.normalize(torch.rand(codebook_size, codebook_dim) * 2 - 1, dim=1))

    @property
    def effective_codebook(self) -> Tensor:
        """The rows at length 1, [K, C] in float32."""
        return F.normalize(self.codebook.float(), dim=1)

    def comparable(self, latents: Tensor) -> Tensor:
        """Latents at length 1; the straight-through gradient is that of these."""
        return F.normalize(latents.float(), dim=-1)

    def start(self) -> None:
        init.uniform_(self.codebook, -1.0, 1.0)  # the published bounds 1 / K are lost when the rows get length 1
        init.copy_(self.codebook, F.normalize(self.codebook, dim=1))


def _radius(errors: Tensor) -> Tensor:
    """The mean squared error of the worse-served half."""
    return errors.topk(max(1, len(errors) // 2)).values.mean()
