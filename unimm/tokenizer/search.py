"""Exact nearest-code search for vector quantization.

A first pass computes scores in float32 or bfloat16 and bounds their rounding errors; codes within the bound of the best
are compared again in float64. The ids are therefore those of exact arithmetic, for any dtype of the first pass, device
and block size, and ties go to the lowest index. Scores are computed in blocks, so those of all latents never exist in
memory at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm.bfloat16 import multiplies_bfloat16

SEARCH_BYTES = 2**26  # largest block of scores, 64 MiB
GROUP = 128  # neighboring codes that are first compared by their best score alone
PAIR_BYTES = 2**20  # block size that stays in the CPU cache
GPU_BYTES = 2**28  # of both on a GPU: every block costs launches, and the host waits for each block's candidates
LOW_PRECISION_WIDTH = 256  # below this the matrix product takes too little of the time for bfloat16 to pay off
_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # largest relative error of one rounding


@torch.no_grad()
def nearest_codes(latents: Tensor, codebook: Tensor, *, low_precision: bool | None = None) -> Tensor:
    """Return the index of the nearest row of `codebook` [K, C], by Euclidean distance, for each latent [..., C].

    `low_precision` computes the first pass in bfloat16, which changes the time and never an id; None: if the device
    multiplies bfloat16 fast and C is at least `LOW_PRECISION_WIDTH`.
    """
    if low_precision is None:
        low_precision = codebook.shape[1] >= LOW_PRECISION_WIDTH and multiplies_bfloat16(codebook.device)
    with torch.autocast(latents.device.type, enabled=False), _sums_in_float32():
        flat, table = latents.detach().reshape(-1, latents.shape[-1]).float(), codebook.detach().float()
        search = _Search(table, torch.bfloat16 if low_precision else torch.float32, len(flat))
        return torch.cat([search(rows) for rows in flat.split(search.rows)]).reshape(latents.shape[:-1])


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """Have a GPU multiply float32 without TF32 inside the context, and add partial bfloat16 sums in float32:
    the error bound assumes both."""
    settings, precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    before, settings.allow_bf16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction, False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
        torch.set_float32_matmul_precision(precision)


class _Search:
    """A search for argmin |z - q|^2 = argmin |q|^2 / 2 - z.q over the rows q of `table` [K, C] in float32."""

    def __init__(self, table: Tensor, dtype: torch.dtype, latents: int) -> None:
        self.table, self.dtype = table, dtype
        self.rounded = table.to(dtype)
        block = SEARCH_BYTES if table.device.type == "cpu" else GPU_BYTES
        self.rows = max(1, min(latents, block // (dtype.itemsize * len(table))))
        # Reused for every block of latents; the columns that pad K to whole groups stay infinite and never win.
        self.block = table.new_full((self.rows, -(-len(table) // GROUP) * GROUP), torch.inf, dtype=dtype)
        norms = torch.linalg.vector_norm(table, dim=1)
        half_norms = norms.square() / 2
        self.offsets = half_norms.to(dtype)
        self.longest, self.largest_offset = norms.max(), half_norms.max()
        self.table_error = _rounding_error(table, self.rounded)

    def __call__(self, latents: Tensor) -> Tensor:
        """Return the ids [n] of latents [n, C] in float32."""
        block = self.block[: len(latents)]
        torch.addmm(self.offsets, latents.to(self.dtype), self.rounded.t(), alpha=-1, out=block[:, : len(self.table)])
        groups = block.unflatten(1, (-1, GROUP))
        best_of_groups = groups.amin(dim=2)
        limit = self._limit(latents, best_of_groups.amin(dim=1))
        # Only groups that hold a candidate are searched, so the scores are read in full only once.
        row, group = (best_of_groups <= limit[:, None]).nonzero(as_tuple=True)
        place, code = (groups[row, group] <= limit[row, None]).nonzero(as_tuple=True)
        return self._settle(latents, row[place], group[place] * GROUP + code)

    def _limit(self, latents: Tensor, best: Tensor) -> Tensor:
        """Return the largest first-pass score that the nearest code can have, [n]."""
        limit = best.float() + 2 * self._error(latents, best.float())
        # Round up, so that rounding the limit itself loses no candidate.
        return torch.nextafter(limit.to(self.dtype), limit.new_tensor(torch.inf).to(self.dtype))

    def _settle(self, latents: Tensor, row: Tensor, code: Tensor) -> Tensor:
        """Return the ids of latents [n, C] from their candidates: code[i] is a candidate of latents[row[i]]."""
        rivals = torch.bincount(row, minlength=len(latents))
        # A non-finite latent has no candidate and gets id 0; the non-finite loss that follows is caught elsewhere.
        ids = code.new_zeros(len(latents)).index_put((row,), code)
        if (rivals > 1).any():
            contested = rivals[row] > 1
            ids = torch.where(rivals > 1, self._decide(latents, row[contested], code[contested]), ids)
        return ids

    def _error(self, latents: Tensor, best: Tensor) -> Tensor:
        """Bound the rounding error of a score that competes with `best`, [n]."""
        lengths, unit = torch.linalg.vector_norm(latents, dim=1), _UNIT[self.dtype]
        inputs = _rounding_error(latents, latents.to(self.dtype), dim=1) * self.longest + lengths * self.table_error
        # Below "highest" torch may multiply float32 matrices in TF32 or bfloat16.
        if self.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            inputs = inputs + 2 * _UNIT[torch.bfloat16] * lengths * self.longest
        # Scores are rounded once or twice; a competitor's is no larger than the best one's and twice this bound.
        output = 4 * unit * (best.abs() + self.largest_offset)
        return (1.01 * (1.01 * inputs + output) + self._sum_error(latents)) / (1 - 8 * unit)

    def _sum_error(self, latents: Tensor) -> Tensor:
        """Bound the rounding error of a score summed in float32 in any order, [n]."""
        products = torch.linalg.vector_norm(latents, dim=1) * self.longest + self.largest_offset
        return 1.02 * (latents.shape[1] + 8) * _UNIT[torch.float32] * products

    def _decide(self, latents: Tensor, row: Tensor, code: Tensor) -> Tensor:
        """Return the best candidate of each latent; candidate i belongs to latents[row[i]] and is table[code[i]]."""
        scores = self._scores(latents, row, code, torch.float32)
        limit = _smallest(scores, row, len(latents)) + 2.02 * self._sum_error(latents)
        near = scores <= limit[row]
        row, code = row[near], code[near]
        scores = self._scores(latents, row, code, torch.float64)
        tied = scores == _smallest(scores, row, len(latents))[row]
        return code.new_full((len(latents),), len(self.table)).scatter_reduce(0, row[tied], code[tied], "amin")

    def _scores(self, latents: Tensor, row: Tensor, code: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute |q|^2 / 2 - z.q of each candidate, [pairs]."""
        size, found = max(1, _pair_bytes(latents) // (dtype.itemsize * latents.shape[1])), []
        for rows, codes in zip(row.split(size), code.split(size), strict=True):
            q, z = F.embedding(codes, self.table).to(dtype), F.embedding(rows, latents).to(dtype)
            found.append(torch.einsum("pc,pc->p", q, q) / 2 - torch.einsum("pc,pc->p", q, z))
        return torch.cat(found)


def _pair_bytes(values: Tensor) -> int:
    """Return the size of a block of pairs on this device."""
    return PAIR_BYTES if values.device.type == "cpu" else GPU_BYTES


def _smallest(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Return the smallest value of each row, [rows]."""
    return values.new_full((rows,), torch.inf).scatter_reduce(0, row, values, "amin")


def _rounding_error(values: Tensor, rounded: Tensor, dim: int | None = None) -> Tensor:
    """Return the norm of each row's rounding error, or, with `dim` None, the largest of these norms."""
    if values.dtype == rounded.dtype:
        return values.new_zeros(len(values) if dim is not None else ())
    rows = max(1, _pair_bytes(values) // (4 * values.shape[1]))
    blocks = zip(values.split(rows), rounded.split(rows), strict=True)
    lengths = torch.cat([torch.linalg.vector_norm(block - taken.float(), dim=1) for block, taken in blocks])
    return lengths if dim is not None else lengths.max()
