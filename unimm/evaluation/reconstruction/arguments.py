"""Arguments of the command that evaluates the reconstructions of an image tokenizer (`unimm eval tok`,
eval/reconstruction.py)."""

import argparse
from collections.abc import Sequence

from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, suite_parser
from unimm.evaluation.runs.protocols import PROTOCOLS

BENCH = "reconstruction"


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    return parse_run(_parser(description), argv, bench=BENCH)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = suite_parser("tok", description, __doc__)
    parser.add_argument("--model", help="an image tokenizer or a unified model; the default comes with the library")
    parser.add_argument("--source", required=True, help="a parquet file or a folder of images")
    parser.add_argument("--kmeans-source", help="images that the k-means baseline learns from")
    parser.add_argument("--reference", help="a tokenizer with the original encoder")
    space = parser.add_mutually_exclusive_group()
    space.add_argument("--inception", metavar="FILE", help="FID's Inception weights")
    space.add_argument("--efficientnet", metavar="FILE", help="EfficientNet-Lite0's weights")
    space.add_argument("--fd-encoder", metavar="PATH", help="a vision encoder: SigLIP, CLIP, DINOv2, ...")
    parser.add_argument("--lpips-trunk", metavar="FILE", help="torchvision's vgg16 weights: LPIPS is measured too")
    parser.add_argument("--lpips-heads", metavar="FILE", help="LPIPS v0.1 for VGG; those of an installed lpips")
    parser.add_argument("--num-images", type=int, default=1000, help="0: all, in the order of their names")
    parser.add_argument("--protocol", default="adm", help=f"how images are cut: {', '.join(PROTOCOLS)}")
    parser.add_argument("--score-size", type=int, help="pixels a side at which images are compared; as drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    add_run_arguments(parser)
    return parser
