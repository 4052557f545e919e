"""Time and memory of a nearest-code search at full size; see eval/bench_quantizer.py."""

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimm.tokenizer.search import nearest_codes


@dataclass
class SearchPlan:
    """`latents` rows of length about sqrt(width) against `codes` rows of length about 0.58, as SimVQ begins."""

    latents: int = 8192
    codes: int = 16384
    width: int = 1536
    repeats: int = 5
    threads: int = 2

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        codebook = torch.randn(self.codes, self.width, generator=generator)
        return torch.randn(self.latents, self.width, generator=generator), codebook * (3 * self.width) ** -0.5


def measure(method: str, plan: SearchPlan) -> dict[str, Any]:
    """{"seconds": the best, "product_seconds": the best of the matrix product, run in turn with it, "extra_gib": by
    which the process' peak of memory grew, "agreement": share of ids that are float64's}."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(method, plan, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _measure(method: str, plan: SearchPlan, answer: Any) -> None:
    torch.set_num_threads(plan.threads)
    latents, codebook = plan.data()
    search, product = METHODS[method](codebook), _matmul(codebook)
    search(latents[:64])  # what is loaded or allocated once
    product(latents)
    before, seconds, product_seconds = _peak_gib(), [], []
    for _ in range(plan.repeats):  # in turn: the machine's speed changes from second to second
        product_seconds.append(_timed(product, latents)[0])
        took, ids = _timed(search, latents)
        seconds.append(took)
    extra = _peak_gib() - before
    result = {"seconds": min(seconds), "product_seconds": min(product_seconds), "extra_gib": extra}
    if method != "matmul":
        result["agreement"] = float((ids == _float64(latents, codebook)).double().mean())
    answer.send(result)
    answer.close()


def _timed(call: Callable[[Tensor], Any], latents: Tensor) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(latents)
    return time.perf_counter() - start, result


def _float64(latents: Tensor, codebook: Tensor) -> Tensor:
    table = codebook.double()
    half_norms = table.square().sum(dim=1) / 2
    return torch.cat([(half_norms - rows.double() @ table.t()).argmin(dim=1) for rows in latents.split(512)])


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _matmul(codebook: Tensor) -> Callable[[Tensor], Any]:
    out = torch.empty(1024, len(codebook))  # blocks of 64 MiB, as the search takes them

    def product(latents: Tensor) -> None:
        for rows in latents.split(1024):
            torch.mm(rows, codebook.t(), out=out[: len(rows)])

    return product


def _library(codebook: Tensor) -> Callable[[Tensor], Tensor]:
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook)).eval()
    layer._codebook.embed.copy_(codebook[None])
    layer._codebook.initted.fill_(True)
    with torch.no_grad():
        return lambda latents: layer(latents[None])[1][0]


METHODS: dict[str, Callable[[Tensor], Callable[[Tensor], Any]]] = {
    "matmul": _matmul,
    "torch.cdist": lambda codebook: lambda latents: torch.cdist(latents, codebook).argmin(dim=1),
    "vector-quantize-pytorch": _library,
    "unimm, float32": lambda codebook: lambda latents: nearest_codes(latents, codebook, low_precision=False),
    "unimm, bfloat16": lambda codebook: lambda latents: nearest_codes(latents, codebook, low_precision=True),
}
