"""`unimm eval`: benchmarks, and the report of a finished run."""

import argparse

from unimm.commands.shared import quiet_libraries
from unimm.evaluation.suites import ALL, REPORT, SUITES, parse_suite, run_suite
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; a suite parses its own."""
    parser.add_argument("suite", choices=[*SUITES, ALL], metavar="SUITE", help=", ".join([*SUITES, ALL]))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="unimm eval SUITE --help lists them")
    parser.set_defaults(json=None)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Run an evaluation suite on a model, or write the report of a finished run."""
    parsed = parse_suite(arguments.suite, arguments.rest)
    if arguments.suite != REPORT:  # a report needs no model: skip the slow import of transformers
        quiet_libraries()
    run_suite(arguments.suite, parsed)
