"""`unimm edit`: an image changed as a prompt says."""

import argparse
import secrets

from unimm.commands.options import add_drawing, add_json, add_model
from unimm.commands.shared import Progress, load_model, saved
from unimm.config.argument_types import number_from_zero
from unimm.data.image_files import check_image_output
from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.runs.report import Report
from unimm.sampling import SAMPLING_NAMES, sampling_options

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
    sampling = sampling_options(arguments)
    if arguments.mask is not None and arguments.strength is not None:
        raise UserError("--mask and --strength both say what to redraw: leave one of them out.")
    image = load_image(arguments.image)
    mask = None if arguments.mask is None else load_image(arguments.mask)
    from unimm.chat import ChatSession

    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    session = ChatSession(*load_model(arguments.model, report))
    with Progress("editing") as progress, report.timed("per_image", share=arguments.num_images):
        shows = progress.images.active and not arguments.no_preview
        images = session.edit(
            arguments.prompt,
            image,
            mask,
            num_images=arguments.num_images,
            seed=seed,
            strength=arguments.strength,
            on_token=progress,
            on_image=progress.show if shows else None,
            parallel_tokens=arguments.parallel_tokens,
            **sampling,
        )
    paths = saved(images, arguments.output, EDITED)
    report.add(prompt=arguments.prompt, images=[str(path) for path in paths], seed=seed)
    told = ("image", "mask", "strength", "parallel_tokens", *SAMPLING_NAMES)
    report.add(**{name: getattr(arguments, name) for name in told})
    report.say("\n".join(str(path) for path in paths))
