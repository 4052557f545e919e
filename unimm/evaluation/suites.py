"""Registry of the suites that `unimm eval` runs; a suite's command is imported only if it is selected.

A suite is a package with two modules: `arguments.parse(argv)` returns the checked arguments without importing torch,
`command.run(arguments)` measures and reports. The script of the same benchmark under eval/ runs the same code.
"""

import argparse
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unimm.errors import UserError, one_line
from unimm.evaluation.runs.arguments import accept_former_names
from unimm.evaluation.runs.records import MANIFEST

REPORT, ALL = "report", "all"


class Suite(NamedTuple):
    """One row of the registry.

    Args:
        package: holds the modules `arguments` and `command`.
        options: arguments of `all` that are passed on to it if given.
    """

    package: str
    options: tuple[str, ...] = ()


SUITES = {
    "tok": Suite("unimm.evaluation.reconstruction", ("model", "source", "num_images")),
    "shapes": Suite("unimm.evaluation.shapes", ("model",)),
    "gen": Suite("unimm.evaluation.geneval", ("model", "detector", "clip")),
    "dpg": Suite("unimm.evaluation.dpg", ("model", "dpg_csv", "vqa_model")),
    "generation": Suite("unimm.evaluation.generation", ("samples", "reference", "inception", "encoder", "kernel_size")),
    "und": Suite("unimm.evaluation.understanding", ("model", "data", "tasks")),
    REPORT: Suite("unimm.evaluation.report"),
}
MEASURING = tuple(name for name in SUITES if name != REPORT)


def parse_suite(name: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of one suite, or those of `all`. Raise UserError for invalid ones."""
    if name == ALL:
        parser = _parser()
        accept_former_names(parser)
        return parser.parse_args(argv)
    parsed: argparse.Namespace = importlib.import_module(f"{SUITES[name].package}.arguments").parse(list(argv))
    return parsed


def run_suite(name: str, arguments: argparse.Namespace) -> None:
    """Run one suite, or `all`, with its parsed arguments. Raise UserError if it cannot run."""
    if name == ALL:
        _run_all(arguments)
    else:
        importlib.import_module(f"{SUITES[name].package}.command").run(arguments)


def _run_all(arguments: argparse.Namespace) -> None:
    """Run every suite in turn, each into its own folder with an HTML report. A suite that lacks something (weights,
    data, a package) does not stop the others: the errors are listed at the end, and the command fails."""
    refused = []
    for name in MEASURING:
        folder = Path(arguments.output) / name
        given = {option: getattr(arguments, option) for option in SUITES[name].options}
        options = [f"--{option.replace('_', '-')}={value}" for option, value in given.items() if value is not None]
        try:
            run_suite(name, parse_suite(name, [*options, "--output", str(folder)]))
            for run in _runs_in(folder):
                run_suite(REPORT, parse_suite(REPORT, [str(run), "--output", str(run / "report.html")]))
        except UserError as error:
            refused.append(f"{name}: {one_line(error)}")
    if refused:
        raise UserError(f"{len(refused)} of {len(MEASURING)} suites did not run: {' '.join(refused)}")


def _runs_in(folder: Path) -> Iterator[Path]:
    """Yield a suite's folder, or its run folders if it writes several runs."""
    own = folder / MANIFEST
    yield from [folder] if own.exists() else (path.parent for path in sorted(folder.glob(f"*/{MANIFEST}")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unimm eval all", description=_run_all.__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="one folder per suite is made in it")
    parser.add_argument("--model", help="a unified model; the default comes with the library")
    parser.add_argument("--source", required=True, help="images that tok reconstructs: a folder or a parquet file")
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="of those images; 0: all of them")
    parser.add_argument("--detector", metavar="DIR", help="of gen: a Mask2Former for COCO's instances")
    parser.add_argument("--clip", metavar="DIR", help="of gen: a CLIP that names colours")
    parser.add_argument("--dpg-csv", metavar="FILE", help="of dpg: the question file")
    parser.add_argument("--vqa-model", metavar="PATH", help="of dpg: who answers the questions")
    parser.add_argument("--samples", metavar="SET", help="of generation: drawn images")
    parser.add_argument("--reference", metavar="SET", help="of generation: real ones")
    parser.add_argument("--inception", metavar="FILE", help="of generation: FID's Inception weights, or")
    parser.add_argument("--encoder", metavar="PATH", help="of generation: a vision encoder")
    parser.add_argument("--kernel-size", type=int, metavar="N", help="of generation: images in a subset of KID")
    parser.add_argument("--data", metavar="DIR", help="of und: local copies of the benchmarks; the hub unless given")
    parser.add_argument("--tasks", help="of und: which benchmarks; all unless given")
    return parser
