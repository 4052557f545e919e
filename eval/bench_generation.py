"""Images a second beside what else draws the same model's image ids, in turns, same weights and prompt.

    python eval/bench_generation.py --json runs/bench_generation.json
    python eval/bench_generation.py --model default --batches 1,4,16 --repeats 5
    python eval/bench_generation.py --width 1024 --layers 28 --image-tokens 1024 --dtype bfloat16

The default is a random Qwen3 of 31 million weights with 16384 codes and 256 image tokens, on a CPU in float32 with two
threads; the last line is Qwen3-0.6B, for a GPU. `bound` is the share of the memory's rate: bytes of weights, keys and
values that a step must read, over its time, over the rate measured here. On a machine with other work compare `cpu s`,
the processor time, instead.
"""

import argparse
import sys
from typing import Any

import torch

from unimm.benchmarks.drawing_speed import PROMPT, Rivals, bandwidth, bytes_per_step, compare, random_model
from unimm.errors import UserError, run_main
from unimm.provenance import git_commit
from unimm.report import Report


def built(arguments: dict[str, Any]) -> tuple[Any, Any, str]:
    """(model, processor, what it is)."""
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
    sizes = {name: arguments[name] for name in ("width", "layers", "codes", "image_tokens")}
    model, processor = random_model(**sizes, dtype=getattr(torch, arguments["dtype"]))
    millions = sum(p.numel() for p in model.model.language_model.parameters()) / 1e6
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), processor, f"random Qwen3, {millions:.1f} million weights"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='a unified model, "default" for the embedded one; without: a random one')
    for name, default in (("width", 512), ("layers", 7), ("codes", 16384), ("image-tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the random model, default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
    parser.add_argument("--batches", default="1,8", help="images at once, default %(default)s")
    parser.add_argument("--scales", default="1,5", help="guidance scales, default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--only", default="", help="the ways whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = vars(parser.parse_args(argv))
    report = Report(arguments.pop("json"))
    torch.set_num_threads(arguments["threads"])
    model, processor, name = built(arguments)
    rate = bandwidth(model.device)
    card = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    report.say(f"{name}, {model.num_image_tokens} image tokens, {model.dtype}, {card}, reads {rate / 1e9:.1f} GB/s")
    found = []
    for scale in (float(each) for each in arguments["scales"].split(",")):
        for batch in (int(each) for each in arguments["batches"].split(",")):
            rivals = Rivals.of(model, processor, batch, scale)
            needed = bytes_per_step(model, batch, scale > 1, rivals.prompt.shape[1])
            report.say(f"\nscale {scale:g}, {batch} at once{'tokens/s':>34}{'ms/step':>10}{'cpu s':>8}{'bound':>8}")
            for way, row in compare(rivals, arguments["repeats"], arguments["only"]).items():
                row["bound"] = needed / rate / (row["seconds"] / model.num_image_tokens)
                report.say(
                    f"{way:<44}{row['tokens_per_second']:>10.1f}{row['ms_per_step']:>10.2f}"
                    f"{row['processor_seconds']:>8.2f}{row['bound']:>8.2f}"
                )
                found.append({"scale": scale, "batch": batch, "way": way, **row})
    report.add(generation=found, model=name, prompt=PROMPT, bandwidth=rate, device=card, commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_generation"))
