"""Argument types, and options that several commands take."""

import argparse

from unimm.config.argument_types import whole_number
from unimm.sampling import add_sampling_arguments

MAX_IMAGES = 256


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model PATH`."""
    parser.add_argument("--model", metavar="PATH", help="a model folder or name (default: the embedded model)")


def add_positional_model(parser: argparse.ArgumentParser) -> None:
    """Add PATH, another way to give `--model`."""
    parser.add_argument("model", nargs="?", metavar="PATH", default=argparse.SUPPRESS, help="the same as --model PATH")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE`."""
    parser.add_argument("--json", metavar="FILE", help="report as one JSON object; - for standard output")


def add_new_folder(parser: argparse.ArgumentParser) -> None:
    """Add `--output FOLDER`, which `unimm.commands.shared.new_folder` checks."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="an empty or new folder")


def add_drawing(parser: argparse.ArgumentParser, output: str) -> None:
    """Add what commands that draw images have in common; `output` is the default name."""
    parser.add_argument(
        "--output", metavar="FILE", help=f"N > 1 images: FILE-1, FILE-2, ... (default: {output}, or a free number)"
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


def image_count(text: str) -> int:
    """Read a number of images, from 1 to MAX_IMAGES."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_IMAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of images from 1 to {MAX_IMAGES}")
    return int(text)
