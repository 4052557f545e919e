"""Benchmark image generation against other ways to sample image tokens from the same model.

    python eval/bench_generation.py --json runs/bench_generation.json
    python eval/bench_generation.py --model default --repeats 5
    python eval/bench_generation.py --width 1024 --layers 28 --head-dim 128 --image-tokens 1024 --dtype bfloat16
    python eval/bench_generation.py --quick

The default is a random Qwen3 of 31 million weights with 16384 codes and 256 image tokens, on a CPU in float32 with two
threads; the third command is Qwen3-0.6B, for a GPU; the last one takes seconds and measures nothing of interest.

The baselines use the same weights and prompt, as a plain causal language model with the image ids in its vocabulary:
transformers' `generate` with its classifier-free guidance (a second forward for the unconditional branch), with a
dynamic and with a static cache, and the simple loop of most image models, both branches batched in one forward. Beside
them are the loops of transformers' Janus and Emu3, on random weights of like size (`generation_neighbours.py`). All run
interleaved in one process, the figures are medians. Columns:

- `first ms`: until the first image token is chosen, in runs that end there.
- `peak MB`: memory at its peak beside the model and the prompt. On a CPU each way runs once in a forked process with
  one thread, from the same state, and its largest resident size is compared with that at its start; on a GPU
  `torch.cuda.max_memory_allocated` is.
- `bound`: the achieved share of the memory bandwidth: the bytes of weights, keys and values that a step must read,
  divided by its time and by the bandwidth of this machine: the best of five sums of a large tensor, or of five copies,
  whose bytes count twice, whichever is faster.
- `cpu s`: processor time; on a busy machine compare this.
"""

import argparse
import ctypes
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from transformers.generation.streamers import BaseStreamer

from eval.generation_neighbours import NEIGHBOURS, Neighbours
from eval.generation_rivals import PROMPT, Rivals, Way, cache_bytes_per_step, random_model, weight_bytes
from unimm.errors import UserError, run_main
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report

SIZES = (("width", 512), ("layers", 7), ("codes", 16384), ("image-tokens", 256), ("head-dim", 64))
QUICK = {"width": 128, "layers": 1, "codes": 32, "image_tokens": 16, "head_dim": 64, "batches": "1,2", "scales": "1,3"}
QUICK |= {"repeats": 1, "threads": 1, "dtype": "float32", "model": None}


class _Reached(Exception):
    """The first token is there."""


class _FirstToken(BaseStreamer):
    """A streamer that ends a generation with its first token."""

    def __init__(self) -> None:
        self.received = 0

    def put(self, value: torch.Tensor) -> None:
        self.received += 1
        if self.received == 2:  # the prompt is the first
            raise _Reached

    def end(self) -> None:
        pass


def first_token_seconds(way: Way) -> float:
    """Return the seconds until a way has chosen its first token."""
    start = time.perf_counter()
    try:
        way(_FirstToken())
    except _Reached:
        _synchronize()
        return time.perf_counter() - start
    raise AssertionError("a way does not report its tokens")


def peak_bytes(way: Way) -> float:
    """Return the memory that a way takes at its peak, beside what is there before; see the module."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way(None)
        return float(torch.cuda.max_memory_allocated() - before)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # free memory that is kept would be used first
        trim(0)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_resident, args=(way, sender))
    child.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        child.join()


def _resident(way: Way, sender: Connection) -> None:
    """Send by how many bytes a way raises this process' resident size."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    before = psutil.Process().memory_info().rss
    way(None)
    sender.send(max(0, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(ways: Mapping[str, Way], batch: int, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the figures of each way, medians over `repeats` rounds, after a warm-up."""
    found = {name: {"peak_bytes": peak_bytes(way)} for name, way in ways.items()}
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    warm = 0 if torch.cuda.is_available() else 1  # there the peak was measured in this process, and has warmed it up
    for _ in range(repeats + warm):
        for name, way in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            drawn = way(None)
            _synchronize()
            times = time.perf_counter() - wall, time.process_time() - processor
            spent[name].append((*times, first_token_seconds(way)))
            assert drawn.shape == (batch, tokens)
    for name, rounds in spent.items():
        seconds, processor, first = (statistics.median(column) for column in zip(*rounds[warm:], strict=True))
        found[name] |= {
            "seconds": seconds,
            "processor_seconds": processor,
            "first_token_seconds": first,
            "tokens_per_second": batch * tokens / seconds,
            "ms_per_step": 1000 * seconds / tokens,
            "images_per_second": batch / seconds,
        }
    return found


def bandwidth(device: torch.device) -> float:
    """Measure the device's memory bandwidth in bytes per second, by sums and by copies of a large tensor."""
    megabytes = 4096 if device.type == "cuda" else 256  # a GPU reads 256 MiB in its latency
    source = torch.ones(megabytes << 18, device=device)
    target, size = torch.empty_like(source), source.numel() * source.element_size()
    target.copy_(source)  # the pages of a fresh tensor are not there yet
    reads = size / _best(lambda: source.sum())
    return max(reads, 2 * size / _best(lambda: target.copy_(source)))


def _best(work: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of five runs."""
    times = []
    for _ in range(5):
        _synchronize()
        start = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def built(arguments: dict[str, Any]) -> tuple[Any, Any, str]:
    """Return (model, processor, description)."""
    if arguments["model"] is not None:
        from unimm.mllm import load

        name = arguments["model"]
        return *load(None if name == "default" else name), name
    if arguments["width"] % 128 or round(arguments["image_tokens"] ** 0.5) ** 2 != arguments["image_tokens"]:
        raise UserError(
            f"--width is {arguments['width']} and --image-tokens {arguments['image_tokens']}: give a multiple of 128 "
            "and a square number."
        )
    torch.manual_seed(0)
    sizes = {name: arguments[name] for name in ("width", "layers", "codes", "image_tokens", "head_dim")}
    model, processor = random_model(**sizes, dtype=getattr(torch, arguments["dtype"]))
    millions = sum(p.numel() for p in model.model.language_model.parameters()) / 1e6
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), processor, f"random Qwen3, {millions:.1f} million weights"


def cases(
    model: Any, processor: Any, arguments: Mapping[str, Any]
) -> Iterator[tuple[float, int, dict[str, Way], dict[str, float]]]:
    """Yield scale, batch, the ways that `--only` asks for, and the bytes that a step of each must read."""
    neighbours: Neighbours | None = None

    def is_asked(name: str) -> bool:
        return any(part in name for part in arguments["only"].split(","))

    for scale in (float(each) for each in arguments["scales"].split(",")):
        for batch in (int(each) for each in arguments["batches"].split(",")):
            rivals = Rivals.of(model, processor, batch, scale)
            length = rivals.prompt.shape[1]
            cache = cache_bytes_per_step(model, batch, scale > 1, length)
            ways = dict(rivals.ways)
            needed = dict.fromkeys(ways, weight_bytes(model) + cache)
            if any(map(is_asked, NEIGHBOURS)):  # to build them takes a while
                neighbours = neighbours or Neighbours.like(model, length)
                others = neighbours.ways(batch, scale)
                ways |= others
                needed |= {name: neighbours.weights(name) + cache for name in others}
            yield scale, batch, {name: way for name, way in ways.items() if is_asked(name)}, needed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='a unified model, "default" for the embedded one; without: a random one')
    for name, default in SIZES:
        parser.add_argument(f"--{name}", type=int, default=default, help="of the random model, default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
    parser.add_argument("--batches", default="1,4,8,16", help="images at once, default %(default)s")
    parser.add_argument("--scales", default="1,5", help="guidance scales, default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--only", default="", help="the ways whose name holds one of these, with commas")
    parser.add_argument("--quick", action="store_true", help="a tiny model once, to see that everything runs")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = vars(parser.parse_args(argv))
    report = Report(arguments.pop("json"))
    if arguments.pop("quick"):
        arguments |= QUICK
    torch.set_num_threads(arguments["threads"])
    model, processor, name = built(arguments)
    rate = bandwidth(model.device)
    card = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    report.say(f"{name}, {model.num_image_tokens} image tokens, {model.dtype}, {card}, {rate / 1e9:.1f} GB/s")
    found = []
    for scale, batch, ways, needed in cases(model, processor, arguments):
        columns = (
            f"{'tokens/s':>10}{'ms/step':>9}{'images/s':>10}{'first ms':>10}{'peak MB':>9}{'cpu s':>8}{'bound':>7}"
        )
        report.say(f"\n{f'scale {scale:g}, {batch} at once':<36}{columns}")
        for way, row in compare(ways, batch, model.num_image_tokens, arguments["repeats"]).items():
            row["bound"] = needed[way] / rate / (row["seconds"] / model.num_image_tokens)
            report.say(
                f"{way:<36}{row['tokens_per_second']:>10.1f}{row['ms_per_step']:>9.2f}{row['images_per_second']:>10.3f}"
                f"{1000 * row['first_token_seconds']:>10.1f}{row['peak_bytes'] / 1e6:>9.1f}"
                f"{row['processor_seconds']:>8.2f}{row['bound']:>7.2f}"
            )
            found.append({"scale": scale, "batch": batch, "way": way, **row})
        report.add(generation=found, model=name, prompt=PROMPT, bandwidth=rate, device=card, commit=git_commit())
        report.write()  # a run that is killed leaves what it has


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_generation"))
