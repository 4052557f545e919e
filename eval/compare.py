"""Put reports of several models into one table.

    python eval/compare.py VQRAE=a/shapes.json,a/probe.json VFMTok=b/shapes.json,b/probe.json

The files are those that eval/shapes.py, eval/reconstruction.py and eval/probe.py write with --json. `make compare`
trains the three tokenizers under one budget, measures them and ends with these tables.
"""

import argparse
import sys

from unimm.benchmarks.side_by_side import read_reports, side_by_side
from unimm.errors import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("columns", nargs="+", metavar="NAME=FILE[,FILE...]", help="a model's reports")
    columns: dict[str, dict[str, float]] = {}
    for column in parser.parse_args(argv).columns:
        name, equals, files = column.partition("=")
        if not (name and equals and files):
            raise UserError(f"{column} is no column: write NAME=FILE, several files with commas between them.")
        columns[name] = read_reports(files.split(","))
    print(side_by_side(columns))


if __name__ == "__main__":
    sys.exit(run_main(main, name="compare"))
