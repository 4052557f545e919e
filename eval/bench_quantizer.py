"""The quantizer's search at full size beside what else finds the nearest code, each in a process of its own.

    python eval/bench_quantizer.py --json quantizer.json

8192 latents against 16384 codes of width 1536: the matrix product alone (the floor of a float32 search), torch.cdist,
vector-quantize-pytorch where it is installed, and `unimm.tokenizer.search` with a first pass in float32 and in
bfloat16. Seconds are the best of `--repeats`, the rate is that of the product run in turn with it; memory is what the
process' peak grew by.
"""

import argparse
import importlib.util
import sys

from unimm.benchmarks.quantizer_search import METHODS, SearchPlan, measure
from unimm.errors import run_main
from unimm.provenance import git_commit
from unimm.report import Report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("latents", 8192), ("codes", 16384), ("width", 1536), ("repeats", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = vars(parser.parse_args(argv))
    report = Report(arguments.pop("json"))
    plan, found = SearchPlan(**arguments), {}
    for name in METHODS:
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
