"""Gradient accumulation beside the whole batch: recipe x k, the largest difference of all that a run leaves behind.

    python eval/bench_accumulation.py --json accumulation.json

Every recipe runs by its debug configuration with one batch of 12, and with 2, 3 and 4 micro-batches of 6, 4 and 3;
compared are weights, averaged weights, optimizer states and GAN statistics.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from unimm.errors import run_main
from unimm.provenance import git_commit
from unimm.report import Report
from unimm.training.accumulation import CASES, differences, left_behind, train

ROOT = Path(__file__).resolve().parents[1]
MICRO_BATCHES = (2, 3, 4)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report, here = Report(arguments.json), Path.cwd()
    torch.set_num_threads(arguments.threads)
    report.say(f"{'recipe':<8}" + "".join(f"  k = {k:<22}" for k in MICRO_BATCHES))
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for case in CASES:
                train(case, 1, ROOT, Path("runs/debug", case))
                whole, cells = left_behind(Path("runs/debug", case)), []
                for k in MICRO_BATCHES:
                    train(case, k, ROOT, Path(f"runs/{k}", case))
                    far = differences(whole, left_behind(Path(f"runs/{k}", case)))
                    name = max(far, key=lambda each: far[each])
                    found.setdefault(case, {})[str(k)] = far[name]
                    cells.append(f"{far[name]:.1e} {name.rsplit('/', 1)[-1][-16:]}")
                report.say(f"{case:<8}" + "".join(f"  {cell:<26}" for cell in cells))
        finally:
            os.chdir(here)
    report.add(largest_differences=found, threads=arguments.threads, commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_accumulation"))
