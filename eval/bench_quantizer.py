"""Benchmark time and memory of the quantizer's nearest-code search at full size against other implementations.

    python eval/bench_quantizer.py --json quantizer.json
    python eval/bench_quantizer.py --device cuda --repeats 20

8192 latents against 16384 codes of width 1536: the matrix product alone (the lower bound of a float32 search),
torch.cdist, vector-quantize-pytorch if installed, and `unimm.tokenizer.search` with a first pass in float32 and in
bfloat16. Each is interleaved with the matrix product. Seconds are the best of `--repeats`, the rate is that of the
product; memory is the growth of the peak: of the process, each in its own, or of tensors on a GPU.
"""

import argparse
import importlib.util
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimm.errors import run_main
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report
from unimm.tokenizer.search import nearest_codes


@dataclass
class SearchPlan:
    """A search of `latents` rows of norm about sqrt(width) in `codes` rows of norm about 0.58, as in SimVQ at start."""

    latents: int = 8192
    codes: int = 16384
    width: int = 1536
    repeats: int = 5
    threads: int = 2
    device: str = "cpu"

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        codebook = torch.randn(self.codes, self.width, generator=generator) * (3 * self.width) ** -0.5
        latents = torch.randn(self.latents, self.width, generator=generator)
        return latents.to(self.device), codebook.to(self.device)


def measure(method: str, plan: SearchPlan) -> dict[str, Any]:
    """Measure one method, on a CPU in a new process.

    Returns:
        "seconds": the best time; "product_seconds": the best of the interleaved matrix product; "extra_gib": growth of
        the process's peak memory; "agreement": share of ids that equal those of a float64 search.
    """
    if plan.device != "cpu":
        return _measured(method, plan)
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
    answer.send(_measured(method, plan))
    answer.close()


def _measured(method: str, plan: SearchPlan) -> dict[str, Any]:
    latents, codebook = plan.data()
    search, product = METHODS[method](codebook), _matmul(codebook)
    search(latents[:64])  # warm-up: loads and allocates what is needed once
    product(latents)
    seconds, product_seconds = list[float](), list[float]()
    if latents.is_cuda:  # the peak of the whole process would hide what the search takes
        torch.cuda.reset_peak_memory_stats(latents.device)
    before = _peak_gib(latents.device)
    for _ in range(plan.repeats):  # interleaved: the machine's speed changes from second to second
        product_seconds.append(_timed(product, latents)[0])
        took, ids = _timed(search, latents)
        seconds.append(took)
    extra = _peak_gib(latents.device) - before
    result = {"seconds": min(seconds), "product_seconds": min(product_seconds), "extra_gib": extra}
    if method != "matmul":
        result["agreement"] = float((ids == _float64(latents, codebook)).double().mean())
    return result


def _timed(call: Callable[[Tensor], Any], latents: Tensor) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(latents)
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)
    return time.perf_counter() - start, result


def _float64(latents: Tensor, codebook: Tensor) -> Tensor:
    table = codebook.double()
    half_norms = table.square().sum(dim=1) / 2
    return torch.cat([(half_norms - rows.double() @ table.t()).argmin(dim=1) for rows in latents.split(512)])


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _matmul(codebook: Tensor) -> Callable[[Tensor], Any]:
    out = codebook.new_empty(1024, len(codebook))  # blocks of 64 MiB, as the search takes them

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("latents", 8192), ("codes", 16384), ("width", 1536), ("repeats", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    parser.add_argument("--only", default="", help="the methods whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = vars(parser.parse_args(argv))
    report, only = Report(arguments.pop("json")), arguments.pop("only")
    plan, found = SearchPlan(**arguments), {}
    for name in (name for name in METHODS if only in name):
        if name == "vector-quantize-pytorch" and importlib.util.find_spec("vector_quantize_pytorch") is None:
            report.say(f"{name:<26} not installed")
            continue
        found[name] = measure(name, plan)
        rate = found[name]["product_seconds"] / found[name]["seconds"]
        equal = "" if name == "matmul" else f"  ids as float64's: {found[name]['agreement']:.6f}"
        report.say(
            f"{name:<26} {found[name]['seconds']:7.3f} s  {rate:6.2f} of the product's rate  "
            f"{found[name]['extra_gib']:6.3f} GiB{equal}"
        )
    report.add(search=found, plan=vars(plan), commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_quantizer"))
