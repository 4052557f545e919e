"""`unimm web`: the server with its web page."""

import argparse

from unimm.commands import serve
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    serve.add_server(parser)
    parser.set_defaults(web=True)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Show a web page to chat with the model, draw and edit; the endpoints of `unimm serve` are there, too."""
    serve.run(arguments, report)
