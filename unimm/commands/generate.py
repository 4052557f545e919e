"""`unimm generate`: images from a prompt."""

import argparse
from functools import partial

from unimm.commands.options import add_drawing, add_json, add_model
from unimm.commands.shared import load_model, save_drawn
from unimm.data.image_files import check_image_output
from unimm.runs.report import Report
from unimm.sampling import sampling_options

DRAWING = "picture.png"
"""Default output name; an existing file is never replaced, the next free number is used instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    parser.add_argument("prompt", metavar="PROMPT")
    add_drawing(parser, DRAWING)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Generate images from a prompt."""
    check_image_output(arguments.output or DRAWING)
    sampling_options(arguments)  # refused before the model is loaded
    from unimm.chat import ChatSession

    session = ChatSession(*load_model(arguments.model, report))
    save_drawn(partial(session.draw, arguments.prompt), arguments, report, DRAWING, "drawing")
