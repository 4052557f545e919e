"""What `unimm eval` runs: a suite is one row, its command is imported when it is asked for.

A command takes its own arguments (`unimm eval SUITE --help` shows them) and reports by itself; the driver of the same
benchmark under eval/ is the same code by path.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from unimm.errors import UserError, one_line

REPORT, ALL = "report", "all"
SUITES = {
    "tok": "unimm.benchmarks.commands.reconstruction:main",
    "shapes": "unimm.benchmarks.commands.shapes:main",
    "gen": "unimm.benchmarks.commands.geneval:main",
    "und": "unimm.benchmarks.understanding:main",
    REPORT: "unimm.benchmarks.commands.report:main",
}
MEASURING = tuple(name for name in SUITES if name != REPORT)


def run_suite(name: str, argv: Sequence[str]) -> None:
    """Run one suite with its arguments, or `all` with those that every suite takes.

    Raises:
        UserError: no such suite, or what the suite refuses.
    """
    if name == ALL:
        _run_all(argv)
        return
    if name not in SUITES:
        raise UserError(f"There is no suite {name!r}; there are {', '.join([*SUITES, ALL])}.")
    module, _, function = SUITES[name].partition(":")
    getattr(importlib.import_module(module), function)(list(argv))


def _run_all(argv: Sequence[str]) -> None:
    """Every suite in turn, each into a folder of its own with its page; what one refuses does not stop the others."""
    parser = argparse.ArgumentParser(prog="unimm eval all", description=_run_all.__doc__)
    parser.add_argument("--model", help="a unified model; the default comes with the library")
    parser.add_argument("--output", required=True, metavar="DIR", help="one folder per suite is made in it")
    parser.add_argument("--source", required=True, help="pictures that tok reconstructs: a folder or a parquet file")
    parser.add_argument("--num-images", default="1000", metavar="N", help="of those pictures; 0: all of them")
    arguments = parser.parse_args(argv)
    own = {"tok": ["--source", arguments.source, "--num-images", arguments.num_images]}
    refused = []
    for name in MEASURING:
        folder = Path(arguments.output) / name
        model = [] if arguments.model is None else ["--model", arguments.model]
        try:
            run_suite(name, [*model, *own.get(name, []), "--output", str(folder)])
            run_suite(REPORT, [str(folder), "--output", str(folder / "report.html")])
        except UserError as error:
            refused.append(f"{name}: {one_line(error)}")
    if refused:
        raise UserError(f"{len(refused)} of {len(MEASURING)} suites did not run: {' '.join(refused)}")
