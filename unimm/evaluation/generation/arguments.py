"""Arguments of the comparison of generated images with real ones: `unimm eval generation`, eval/generation.py."""

import argparse
from collections.abc import Sequence

from unimm.errors import UserError
from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, suite_parser

BENCH = "generation"


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the arguments and check them."""
    arguments = parse_run(_parser(description), argv, bench=BENCH)
    _check(arguments)
    return arguments


def _parser(description: str | None) -> argparse.ArgumentParser:
    made = suite_parser("generation", description, __doc__)
    made.add_argument("--samples", metavar="SET", help="the drawn images: a folder, a parquet file or an npz")
    made.add_argument("--reference", metavar="SET", help="the real ones, or their statistics")
    made.add_argument("--inception", metavar="FILE", help="FID's Inception weights")
    made.add_argument("--encoder", metavar="PATH", help="a vision encoder instead: SigLIP, CLIP, DINOv2, ...")
    made.add_argument("--num-images", type=int, help="take the first N of each set; all unless given")
    made.add_argument("--kernel-size", type=int, help="images in one subset of KID; 1000, or all of fewer")
    made.add_argument("--batch-size", type=int, default=50)
    made.add_argument("--device", help="cpu, cuda, ...; a GPU where there is one")
    made.add_argument("--write-npz", metavar="FILE", help="write the samples as arr_0")
    made.add_argument("--write-statistics", metavar="FILE", help="write the samples' mu, sigma (mu_s, sigma_s)")
    made.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    add_run_arguments(made)
    return made


def _check(arguments: argparse.Namespace) -> None:
    if arguments.samples is None or arguments.reference is None:
        raise UserError("Name two sets: --samples, the drawn images, and --reference, the real ones.")
    if (arguments.inception is None) == (arguments.encoder is None):
        raise UserError("Name the network that compares: either --inception FILE or --encoder PATH.")
    for name in ("num_images", "kernel_size", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
