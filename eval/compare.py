"""Print a Markdown table of several models' evaluation reports: one row per metric, one column per model.

    python eval/compare.py VQRAE=a/shapes.json,a/probe.json VFMTok=b/shapes.json,b/probe.json

The files are those that eval/shapes.py, eval/reconstruction.py and eval/probe.py write with --json. `make compare`
trains the three tokenizers with the same budget, evaluates them and prints these tables.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimm.errors import UserError, reading, run_main

SECTIONS = ("reconstruction", "chat", "generation", "edits", "interleaved", "phrasing", "strict", "probe")
SETTINGS = ("base_rate", "sweep")  # hyper-parameters found by a probe, not metrics
MISSING = "-"


def read_reports(paths: Sequence[str | Path]) -> dict[str, float]:
    """Read the metrics of one model's reports as {`section/name`: value}.

    Raises:
        UserError: a file is not a report, or two files have different values for one metric.
    """
    found: dict[str, float] = {}
    for path in paths:
        with reading("The report", path):
            report = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not set(SECTIONS) & set(report):
            raise UserError(f"{path} is no report: it has none of {', '.join(SECTIONS)}.")
        for name, value in _numbers({section: report[section] for section in SECTIONS if section in report}):
            if found.setdefault(name, value) != value:
                raise UserError(
                    f"{path} says {name} is {value:g}, a report before it {found[name]:g}: give one of them."
                )
    return found


def side_by_side(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table with metrics (rows) and models (columns) in order of first appearance."""
    names = list(dict.fromkeys(name for numbers in columns.values() for name in numbers))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name in names:
        lines.append([name, *(_shown(numbers.get(name)) for numbers in columns.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in SETTINGS:
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in SETTINGS:
            yield f"{prefix}{key}", float(value)


def _shown(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


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
