"""Arguments of GenEval (`unimm eval gen`, eval/geneval.py): draw or read images and score them.

The scorer is first checked on known images. With `--vqa`, a VQA model scores the same images a second time. Other modes
compare verdicts with human annotations (`--calibrate`), search training captions for the prompts (`--contamination`),
or write the prompts (`--write-prompts`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from unimm.errors import UserError
from unimm.evaluation.geneval.rules import GRAY, Thresholds
from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, suite_parser
from unimm.sampling import SAMPLING_HELP, SAMPLING_NAMES, add_sampling_arguments, sampling_options

BENCH = "geneval"


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the arguments and check them."""
    arguments = parse_run(_parser(description), argv, bench=BENCH)
    if all(getattr(arguments, name) is None for name in ("calibrate", "contamination", "write_prompts")):
        _check_scoring(arguments)
    return arguments


def _check_scoring(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        raise UserError("--output DIR is not given: images, detections and verdicts are kept there.")
    sampling_options(arguments)
    drawing = ("model", "prompts", "limit", *SAMPLING_NAMES)
    unused = [f"--{name.replace('_', '-')}" for name in drawing if getattr(arguments, name) is not None]
    if arguments.images is not None and unused:
        raise UserError(f"--images scores images that are there already: leave out {', '.join(unused)}.")
    if arguments.export is not None and Path(arguments.export).exists():
        raise UserError(f"--export {arguments.export} exists: choose a new folder, nothing is overwritten.")


def _parser(description: str | None) -> argparse.ArgumentParser:
    made = suite_parser("gen", description, __doc__)
    add_run_arguments(made)
    made.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    source = made.add_argument_group("images")
    source.add_argument("--model", help="a unified model; the default comes with the library")
    source.add_argument("--images", metavar="DIR", help="score this folder (official layout) instead of drawing")
    source.add_argument("--prompts", metavar="FILE", help="another list (JSONL), reported as a track of its own")
    source.add_argument("--shapes", action="store_true", help="the shapes data set: its prompts, its own detector")
    source.add_argument("--num-images", type=int, default=4, help="images of each prompt (default 4)")
    source.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each tag")
    source.add_argument("--seed", type=int, default=0, help="default 0")
    source.add_argument("--batch-size", type=int, default=8, help="images in one forward (default 8)")
    source.add_argument("--export", metavar="DIR", help="also copy the images into the official layout")
    add_sampling_arguments(made.add_argument_group("sampling", SAMPLING_HELP))
    scorer = made.add_argument_group("scorers")
    scorer.add_argument("--detector", metavar="DIR", help="a Mask2Former for COCO's instances")
    scorer.add_argument("--clip", metavar="DIR", help="a CLIP that names colors")
    scorer.add_argument("--vqa-model", metavar="DIR", help="a second scorer, which answers questions about the images")
    scorer.add_argument("--sanity-images", metavar="DIR", help="known images (official layout, with `expected`)")
    scorer.add_argument("--device", help="of the scorers and the model (default: the GPU when there is one)")
    scorer.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the scorers")
    scorer.add_argument("--background", default=GRAY, help='around an object with a named color; "original" keeps it')
    scorer.add_argument("--no-crop", action="store_true", help="show the color classifier the whole image")
    for option in fields(Thresholds):
        kind = int if option.name == "max_objects" else float
        name = f"--{option.name.replace('_', '-')}"
        scorer.add_argument(name, type=kind, help=f"default {option.default}, of geneval-hf")
    other = made.add_argument_group("instead of scoring")
    other.add_argument("--calibrate", nargs="+", metavar="CSV", help="compare --verdicts with people's annotations")
    other.add_argument("--verdicts", metavar="DIR", help="the folder of a finished run")
    other.add_argument("--contamination", metavar="FILE", help="look for the prompts in these captions (txt, jsonl)")
    other.add_argument("--write-prompts", metavar="FILE", help="write the prompts as metadata, one JSON object a line")
    return made
