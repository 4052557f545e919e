"""`unimm generate`: images from a prompt."""

import argparse
import secrets

from unimm.commands.options import add_json, add_model, image_count, scale, whole_number
from unimm.commands.shared import Progress, load_model, saved
from unimm.data.images import check_image_output
from unimm.runs.report import Report

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
    parser.add_argument("--guidance-scale", type=scale, metavar="G", help="how closely to follow the prompt; 1 = off")
    parser.add_argument(
        "--parallel-tokens",
        type=lambda text: text if text == "auto" else whole_number(text),
        default=1,
        metavar="W",
        help="guess W image tokens ahead, or auto: faster for few images, the same images",
    )
    parser.add_argument(
        "--temperature", type=scale, metavar="T", help="how freely to draw; 0 = always the likeliest id"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Generate images from a prompt."""
    check_image_output(arguments.output or DRAWING)
    from unimm.chat import ChatSession

    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    session = ChatSession(*load_model(arguments.model, report))
    options = {
        "guidance_scale": arguments.guidance_scale,
        "temperature": arguments.temperature,
        "parallel_tokens": arguments.parallel_tokens,
    }
    with Progress("drawing") as progress, report.timed("per_image", share=arguments.num_images):
        images = session.draw(
            arguments.prompt, num_images=arguments.num_images, seed=seed, on_token=progress, **options
        )
    paths = saved(images, arguments.output, DRAWING)
    report.add(prompt=arguments.prompt, images=[str(path) for path in paths], seed=seed, **options)
    report.say("\n".join(str(path) for path in paths))
