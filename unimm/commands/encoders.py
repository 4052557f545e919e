"""`unimm encoders`: the vision encoders that a tokenizer can be built on."""

import argparse

from unimm.commands.options import add_json
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """List the vision encoders that an image tokenizer can be built on."""
    from dataclasses import asdict

    from unimm.tokenizer.published import PUBLISHED, encoder_table

    report.add(encoders={name: asdict(encoder) for name, encoder in PUBLISHED.items()})
    report.say(encoder_table())
