"""Vector quantizers: map latents [B, M, C] to the nearest rows of a codebook [K, C], and ids back to codes.

- `SimVQ` (arXiv 2411.02038, VQRAE): the codebook is Q = C W, with C frozen at its random initialization and W learned.
  An update of W moves every row, unused ones too, so the codebook does not collapse.
- `NormalizedVQ` (LlamaGen, arXiv 2406.06525; VFMTok, IDEAL): low-dimensional, codes and latents L2-normalized.
- `PlainVQ` and `AveragedVQ` (VQ-VAE, arXiv 1711.00937, section 3 and appendix A.1): codes learned by the codebook loss,
  or as moving averages of their latents. VQRAE can be built with either, to compare them with SimVQ.

The nearest-code search is exact (`tokenizer.search`), also under autocast. `lookup` and `forward` use the same
operation, W and normalization included (SimVQ's published code omits W), so decoding ids is bitwise equal. Codes are
gathered with `F.embedding` because the backward of plain indexing is not deterministic on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from transformers import initialization as init

from unimm.errors import UserError
from unimm.tokenizer.layers import OwnStart
from unimm.tokenizer.precision import Float32Module
from unimm.tokenizer.search import nearest_codes


@dataclass
class QuantizerOutput:
    """Output of a quantizer: codes [B, M, C] (with straight-through gradient if enabled), ids [B, M], scalar losses."""

    codes: Tensor
    ids: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def _itself(value: Tensor) -> Tensor:
    return value


def code_entropy(
    latents: Tensor, codebook: Tensor, temperature: float, *, share: Callable[[Tensor], Tensor] = _itself
) -> Tensor:
    """Compute the entropy loss of latents [..., C] over a codebook [K, C]: mean H(p) - H(mean p).

    p = softmax(-|z - q|^2 / temperature) over the codes (LlamaGen's code, which IDEAL follows). The loss is between
    -ln K and 0, and low if every latent is assigned confidently and all codes are used. `share` averages the [K] mean
    probabilities over the processes of a run.
    """
    flat = latents.reshape(-1, latents.shape[-1]).float()
    with torch.autocast(flat.device.type, enabled=False):
        distances = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.t()
        log_p = F.log_softmax(-distances / temperature, dim=1)
    average = share(log_p.exp().mean(0))
    return -(log_p.exp() * log_p).sum(1).mean() + (average * (average + 1e-5).log()).sum()


class Quantizer(Float32Module, OwnStart):
    """Base class of the quantizers.

    `codebook` [K, C] is the stored tensor, `effective_codebook` [K, C] the codes that latents are compared with. A
    subclass defines `effective_codebook`, `comparable` and how a code is set (`adopt`, `move`).
    """

    codebook: Tensor

    @property
    def effective_codebook(self) -> Tensor:
        """Return the codes [K, C] in float32, differentiable."""
        raise NotImplementedError

    def comparable(self, latents: Tensor) -> Tensor:
        """Return latents [..., C] as they are compared with `effective_codebook`, in float32."""
        return latents.float()

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents [B, M, C] and compute both quantization losses (means over all elements).

        The codebook loss updates the codebook only, the commitment loss the latents only; the gradient of the
        reconstruction reaches the latents and not the codebook (VQRAE, section 3.4).
        """
        latents = self.comparable(latents)
        table = self.effective_codebook
        ids = nearest_codes(latents, table)
        codes = F.embedding(ids, table)
        codebook_loss = F.mse_loss(codes, latents.detach())
        commitment_loss = F.mse_loss(latents, codes.detach())
        out = codes.detach()
        if torch.is_grad_enabled() and latents.requires_grad:
            out = latents + (out - latents).detach()  # rounds, so done only if a gradient is needed
        return QuantizerOutput(out, ids, codebook_loss, commitment_loss)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the codes [B, M, C] of ids [B, M]. Raises UserError for an id outside the codebook."""
        size = len(self.codebook)
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < size):
            raise UserError(f"Image ids run from 0 to {size - 1}; these run from {int(ids.min())} to {int(ids.max())}.")
        return F.embedding(ids, self.effective_codebook)

    def entropy(self, latents: Tensor, temperature: float, *, share: Callable[[Tensor], Tensor] = _itself) -> Tensor:
        """Compute `code_entropy` of latents [B, M, C] over this codebook."""
        return code_entropy(self.comparable(latents), self.effective_codebook, temperature, share=share)

    def adopt(self, codes: Tensor) -> None:
        """Set the effective codebook to `codes` [K, C]."""
        self.codebook.copy_(codes)

    def move(self, ids: Tensor, targets: Tensor) -> None:
        """Set the effective codes of `ids` [n] to `targets` [n, C]."""
        self.codebook[ids] = self.comparable(targets).to(self.codebook.dtype)


class SimVQ(Quantizer):
    """SimVQ (arXiv 2411.02038): `codebook` is C [K, C], a persistent buffer unless it is trained; `projection` is W."""

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
        """Return Q = C W, [K, C] in float32, differentiable with respect to W."""
        with torch.autocast(self.codebook.device.type, enabled=False):
            return self.projection(self.codebook)

    def start(self) -> None:
        init.normal_(self.codebook, std=self.codebook.shape[1] ** -0.5)
        init.kaiming_uniform_(self.projection.weight, a=5**0.5)

    def adopt(self, codes: Tensor) -> None:
        """Set C to `codes` [K, C] and W to the identity."""
        self.codebook.copy_(codes)
        self.projection.weight.copy_(torch.eye(codes.shape[1]))
        if self.projection.bias is not None:
            self.projection.bias.zero_()

    def move(self, ids: Tensor, targets: Tensor) -> None:
        """Solve for the rows `ids` [n] of C that the unchanged W maps onto `targets` [n, C]."""
        targets = targets - (0 if self.projection.bias is None else self.projection.bias)
        # In float64, because the last bit of a float32 solution depends on the tensors' memory alignment.
        solution = torch.linalg.lstsq(self.projection.weight.double(), targets.double().t()).solution
        self.codebook[ids] = solution.t().to(self.codebook.dtype)


class NormalizedVQ(Quantizer):
    """A codebook [K, C] learned by the codebook and entropy losses, with L2-normalized rows and latents."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(F.normalize(torch.rand(codebook_size, codebook_dim) * 2 - 1, dim=1))

    @property
    def effective_codebook(self) -> Tensor:
        """Return the L2-normalized rows, [K, C] in float32."""
        return F.normalize(self.codebook.float(), dim=1)

    def comparable(self, latents: Tensor) -> Tensor:
        """Return the L2-normalized latents; the straight-through gradient is taken at these."""
        return F.normalize(latents.float(), dim=-1)

    def start(self) -> None:
        init.uniform_(self.codebook, -1.0, 1.0)  # LlamaGen's bounds 1 / K have no effect after normalization
        init.copy_(self.codebook, F.normalize(self.codebook, dim=1))


class PlainVQ(Quantizer):
    """VQ-VAE's codebook [K, C], learned by the codebook loss: only chosen rows receive a gradient."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(
            torch.empty(codebook_size, codebook_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        )

    @property
    def effective_codebook(self) -> Tensor:
        """Return the rows, [K, C] in float32."""
        return self.codebook.float()

    def start(self) -> None:
        bound = 1 / len(self.codebook)
        init.uniform_(self.codebook, -bound, bound)


class AveragedVQ(Quantizer):
    """VQ-VAE's codebook [K, C] as moving averages: a row is the decayed sum of its latents over their decayed count.

    Every forward in training mode with gradients updates the rows, after its lookup, with the latents of all processes.
    Counts are smoothed, so that a row without latents stays finite.
    """

    decay, smoothing = 0.99, 1e-5
    counts: Tensor  # [K]
    sums: Tensor  # [K, C]

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        rows = torch.randn(codebook_size, codebook_dim) * codebook_dim**-0.5
        self.register_buffer("codebook", rows)
        self.register_buffer("sums", rows.clone())
        self.register_buffer("counts", torch.ones(codebook_size))

    @property
    def effective_codebook(self) -> Tensor:
        """Return the rows, [K, C] in float32."""
        return self.codebook

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents [B, M, C] as the base class does, then update the codebook with them if training."""
        output = super().forward(latents)
        if self.training and torch.is_grad_enabled():
            self.update(latents.detach().float().flatten(0, -2), output.ids.flatten())
        return output

    @torch.no_grad()
    def update(self, latents: Tensor, ids: Tensor) -> None:
        """Add latents [n, C] with their ids [n] to the averages."""
        counts = torch.bincount(ids, minlength=len(self.counts)).to(self.counts.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, ids, latents)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.smoothing) / (total + len(self.counts) * self.smoothing) * total
        self.codebook.copy_(self.sums / smoothed[:, None])

    def adopt(self, codes: Tensor) -> None:
        """Set the codes to `codes` [K, C] and start their averages anew."""
        self._restart(slice(None), codes)

    def move(self, ids: Tensor, targets: Tensor) -> None:
        """Set the codes of `ids` [n] to `targets` [n, C] and start their averages anew."""
        self._restart(ids, targets)

    def _restart(self, ids: slice | Tensor, codes: Tensor) -> None:
        for table in (self.codebook, self.sums):
            table[ids] = codes.to(table.dtype)
        self.counts[ids] = 1

    def start(self) -> None:
        init.normal_(self.codebook, std=self.codebook.shape[1] ** -0.5)
        init.copy_(self.sums, self.codebook)
        init.ones_(self.counts)


QUANTIZERS: dict[str, type[Quantizer]] = {
    "simvq": SimVQ,
    "vq": PlainVQ,
    "averaged": AveragedVQ,
    "normalized": NormalizedVQ,
}
"""The quantizers that VQRAE can be built with, by their names in its configuration."""
