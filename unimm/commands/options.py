"""Argument types, and options that several commands take."""

import argparse

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


def image_count(text: str) -> int:
    """Read a number of images, from 1 to MAX_IMAGES."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_IMAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of images from 1 to {MAX_IMAGES}")
    return int(text)
