"""`unimm generate`: images from a prompt."""

import argparse
import secrets

from unimm.commands.options import add_json, add_model, image_count
from unimm.commands.shared import Progress, load_model, saved
from unimm.config.argument_types import whole_number
from unimm.data.images import check_image_output
from unimm.runs.report import Report
from unimm.sampling import SAMPLING_NAMES, add_sampling_arguments, sampling_options

DRAWING = "picture.png"
"""Default output name; an existing file is never replaced, the next free number is used instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument(
        "--output", metavar="FILE", help=f"N > 1 images: FILE-1, FILE-2, ... (default: {DRAWING}, or a free number)"
    )
    parser.add_argument("--num-images", type=image_count, default=1, metavar="N")
    parser.add_argument("--seed", type=whole_number, metavar="S", help="image k depends on (S, k) only")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--parallel-tokens",
        type=lambda text: text if text == "auto" else whole_number(text),
        default=1,
        metavar="W",
        help="guess W image tokens ahead, or auto: faster for few images, the same images",
    )
    parser.add_argument("--no-preview", action="store_true", help="do not show the image so far in the terminal")


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
