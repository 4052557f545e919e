"""Arguments of the command that checks memorization (eval/nearest.py).

A generated image is right if no other image of the set is nearer to it, in pixels, than the one whose caption was the
prompt. The tokenizer's reconstructions are measured beside it: they are the upper bound for generated images.
"""

import argparse
from collections.abc import Sequence

from unimm.evaluation.runs.arguments import add_run_arguments, parse_run
from unimm.sampling import SAMPLING_HELP, add_sampling_arguments, sampling_options

BENCH = "nearest"


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description or __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a unified model; the default comes with the library")
    parser.add_argument("--source", required=True, help="captioned images: a parquet file with image and text")
    parser.add_argument("--num-images", type=int, default=0, help="the first so many; 0: all")
    parser.add_argument("--batch-size", type=int, default=64, help="drawings at a time")
    add_sampling_arguments(parser.add_argument_group("sampling", SAMPLING_HELP))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", metavar="FILE", help="write a page of prompts and images")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    add_run_arguments(parser)
    arguments = parse_run(parser, argv, bench=BENCH)
    sampling_options(arguments)
    if arguments.output is None:
        parser.error("--output DIR is needed: the drawings are kept there")
    return arguments
