"""The command line `unimm`: demo, chat, generate, edit, reconstruct, serve, web; atlas, encoders, attach, detach,
merge, convert, export, doctor; eval.

The first seven take `--model PATH` (default: the embedded model). All but `eval` take `--json FILE` (`-` = standard
output), which receives one JSON object with the results and the seconds they took. A user error is one line on standard
error and exit code 2, raised before the model is loaded and torch is imported if possible: commands import what they
need after checking their arguments. No output is left half-written.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from unimm import __version__
from unimm.commands import (
    atlas,
    attach,
    chat,
    convert,
    demo,
    detach,
    doctor,
    edit,
    encoders,
    evaluate,
    export,
    generate,
    merge,
    reconstruct,
    serve,
    web,
)
from unimm.errors import UserError, one_line, run_main
from unimm.runs.report import Report

INTERRUPTED_EXIT_CODE = 130


class Command(Protocol):
    """A module of `unimm.commands`."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Add the command's arguments."""

    def run(self, arguments: argparse.Namespace, report: Report, /) -> int | None:
        """Run the command and return its exit code, None for success; the first line of this docstring is its help."""


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "chat": chat,
    "generate": generate,
    "edit": edit,
    "reconstruct": reconstruct,
    "serve": serve,
    "web": web,
    "atlas": atlas,
    "encoders": encoders,
    "attach": attach,
    "detach": detach,
    "merge": merge,
    "convert": convert,
    "export": export,
    "doctor": doctor,
    "eval": evaluate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 `doctor` failure, 2 user error, 130 interrupted."""
    try:
        return run_main(lambda: _run(argv))
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE


def _run(argv: Sequence[str] | None) -> int | None:
    arguments = build_parser().parse_args(argv)
    report = Report(arguments.json)
    code: int | None = arguments.command(arguments, report)
    report.write()
    return code


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises a `UserError` (one line, no usage text) instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(ValueError(message))} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; `parse_args` returns the function to run as `command`."""
    parser = _Parser(prog="unimm", description="One model that understands images and draws them.")
    parser.add_argument("--version", action="version", version=f"unimm {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = (command.run.__doc__ or "").partition("\n")[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        command.add_arguments(subparser)
        subparser.set_defaults(command=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
