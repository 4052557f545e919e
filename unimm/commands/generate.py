"""`unimm generate`: images from a prompt."""

import argparse
import secrets

from unimm.commands.options import add_drawing, add_json, add_model
from unimm.commands.shared import Progress, load_model, saved
from unimm.data.image_files import check_image_output
from unimm.runs.report import Report
from unimm.sampling import SAMPLING_NAMES, sampling_options

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
    sampling = sampling_options(arguments)
    from unimm.chat import ChatSession

    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    session = ChatSession(*load_model(arguments.model, report))
    with Progress("drawing") as progress, report.timed("per_image", share=arguments.num_images):
        shows = progress.images.active and not arguments.no_preview
        images = session.draw(
            arguments.prompt,
            num_images=arguments.num_images,
            seed=seed,
            on_token=progress,
            on_image=progress.show if shows else None,
            parallel_tokens=arguments.parallel_tokens,
            **sampling,
        )
    paths = saved(images, arguments.output, DRAWING)
    report.add(prompt=arguments.prompt, images=[str(path) for path in paths], seed=seed)
    report.add(**{name: getattr(arguments, name) for name in (*SAMPLING_NAMES, "parallel_tokens")})
    report.say("\n".join(str(path) for path in paths))
