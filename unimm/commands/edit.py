"""`unimm edit`: an image changed as a prompt says."""

import argparse
import secrets

from unimm.commands.options import add_drawing, add_json, add_model, drawing_options, scale
from unimm.commands.shared import Progress, load_model, saved
from unimm.data.images import check_image_output, load_image
from unimm.errors import UserError
from unimm.runs.report import Report

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
        "--strength", type=scale, metavar="X", help="without a mask, redraw this share of the image tokens, up to 1"
    )
    parser.add_argument(
        "--image-guidance-scale", type=scale, metavar="G", help="how closely to follow the image; 1 = off"
    )
    add_drawing(parser, EDITED)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Edit an image by a prompt, the whole of it or what a mask shows."""
    check_image_output(arguments.output or EDITED)
    if arguments.mask is not None and arguments.strength is not None:
        raise UserError("--mask and --strength both say what to redraw: leave one of them out.")
    image = load_image(arguments.image)
    mask = None if arguments.mask is None else load_image(arguments.mask)
    from unimm.chat import ChatSession

    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    session = ChatSession(*load_model(arguments.model, report))
    options = {
        **drawing_options(arguments),
        "image_guidance_scale": arguments.image_guidance_scale,
        "strength": arguments.strength,
    }
    with Progress("editing") as progress, report.timed("per_image", share=arguments.num_images):
        images = session.edit(
            arguments.prompt, image, mask, num_images=arguments.num_images, seed=seed, on_token=progress, **options
        )
    paths = saved(images, arguments.output, EDITED)
    report.add(prompt=arguments.prompt, image=arguments.image, mask=arguments.mask, seed=seed, **options)
    report.add(images=[str(path) for path in paths])
    report.say("\n".join(str(path) for path in paths))
