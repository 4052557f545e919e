"""Command-line arguments shared by all benchmarks: `--output DIR` keeps a run, `--from MANIFEST` repeats one.

Imports nothing heavy: the arguments are parsed before any model is loaded.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from unimm.config.schema import plain
from unimm.errors import UserError
from unimm.evaluation.runs.records import FORMER_ARGUMENTS, read_manifest

ABOUT_THE_PLACE = frozenset({"output", "repeated", "json", "rows", "page"})
"""Arguments that say where results go, not what is computed: a manifest omits them, so a repeated run sets its own."""


def suite_parser(suite: str, description: str | None, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser for a script with its own `description`, or for `unimm eval SUITE`, which shows `doc`."""
    return argparse.ArgumentParser(
        prog=None if description else f"unimm eval {suite}",
        description=description or doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--output` and `--from`; parse with `parse_run`."""
    parser.add_argument("--output", metavar="DIR", help="keep every sample there; an interrupted run goes on")
    parser.add_argument(
        "--from",
        dest="repeated",
        metavar="MANIFEST",
        help="repeat the run of this manifest.json; what else is given replaces its arguments",
    )


def accept_former_names(parser: argparse.ArgumentParser) -> None:
    """Let the parser take options by their former names too; its help does not show them."""
    options = parser._option_string_actions
    for former, name in FORMER_ARGUMENTS.items():
        if (option := _option(name)) in options:
            options.setdefault(_option(former), options[option])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_run(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, bench: str | Sequence[str]
) -> argparse.Namespace:
    """Parse the arguments; those of the repeated run are the defaults.

    Args:
        bench: the benchmark of the command; several if it writes one run per benchmark, any of which records the
            arguments.

    Raises:
        UserError: the manifest cannot be read, is of another benchmark, or names arguments that this command lacks.
    """
    accept_former_names(parser)
    # read --from before the full parse: the manifest's arguments become its defaults
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--from", dest="repeated")
    source = first.parse_known_args(argv)[0].repeated
    if source is not None:
        manifest = read_manifest(source)
        measured = (bench,) if isinstance(bench, str) else bench
        if manifest.bench not in measured:
            known = ", ".join(measured)
            raise UserError(f"{source} is of a run of {manifest.bench}, this command measures {known}.")
        actions = {action.dest: action for action in parser._actions}
        if unknown := sorted(set(manifest.arguments) - set(actions)):
            raise UserError(f"{source} has arguments that this version does not know: {', '.join(unknown)}.")
        for name in manifest.arguments:
            actions[name].required = False  # argparse would demand it on the command line despite the default
        parser.set_defaults(**manifest.arguments)
    return parser.parse_args(argv)


def recorded_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that a manifest records, as plain values."""
    kept = {name: value for name, value in vars(arguments).items() if name not in ABOUT_THE_PLACE}
    recorded: dict[str, Any] = plain(kept)
    return recorded
