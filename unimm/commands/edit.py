"""`unimm edit`: an image changed as a prompt says."""

import argparse
from functools import partial

from unimm.commands.options import add_drawing, add_json, add_model
from unimm.commands.shared import load_model, save_drawn
from unimm.config.argument_types import number_from_zero
from unimm.data.image_files import check_image_output
from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.runs.report import Report
from unimm.sampling import sampling_options

EDITED = "edited.png"
"""Default output name; an existing file is never replaced, the next free number is used instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    parser.add_argument("prompt", metavar="PROMPT", help='what to change, such as "make the circle blue"')
    parser.add_argument("--image", required=True, metavar="FILE", help="the image to edit")
    parser.add_argument("--mask", metavar="FILE", help="what to redraw, in white; all other image tokens are kept")
    parser.add_argument(
        "--strength",
        type=number_from_zero,
        metavar="X",
        help="without a mask, redraw this share of the image tokens, up to 1",
    )
    add_drawing(parser, EDITED)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Edit an image by a prompt, the whole of it or what a mask shows."""
    check_image_output(arguments.output or EDITED)
    sampling_options(arguments)  # refused before the model is loaded
    if arguments.mask is not None and arguments.strength is not None:
        raise UserError("--mask and --strength both say what to redraw: leave one of them out.")
    image = load_image(arguments.image)
    mask = None if arguments.mask is None else load_image(arguments.mask)
    from unimm.chat import ChatSession

    session = ChatSession(*load_model(arguments.model, report))
    report.add(**{name: getattr(arguments, name) for name in ("image", "mask", "strength")})
    draw = partial(session.edit, arguments.prompt, image, mask, strength=arguments.strength)
    save_drawn(draw, arguments, report, EDITED, "editing")
