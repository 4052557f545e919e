"""Arguments of DPG-Bench (`unimm eval dpg`, eval/dpg.py)."""

import argparse
from collections.abc import Sequence

from unimm.errors import UserError
from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, suite_parser
from unimm.sampling import SAMPLING_HELP, add_sampling_arguments, sampling_options

BENCH = "dpg"
GET_CSV = "dpg_bench.csv from ELLA's repository (dpg_bench/), or from Jialuo21/DPG-Bench on the hub"


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the arguments and check them."""
    arguments = parse_run(_parser(description), argv, bench=BENCH)
    _check(arguments)
    sampling_options(arguments)
    return arguments


def _parser(description: str | None) -> argparse.ArgumentParser:
    made = suite_parser("dpg", description, __doc__)
    asked = made.add_argument_group("what is drawn and asked")
    asked.add_argument("--dpg-csv", metavar="FILE", help="the benchmark's question file, dpg_bench.csv")
    asked.add_argument("--prompts", metavar="FILE", help="lines of item_id and prompt: draw only, ask nothing")
    asked.add_argument("--limit", type=int, help="the first prompts only")
    images = made.add_argument_group("images")
    images.add_argument("--model", help="a unified model that draws; the default comes with the library")
    images.add_argument("--images", metavar="DIR", help="score these grids, ITEM.png, instead of drawing")
    images.add_argument("--resolution", type=int, help="with --images: the side of one image of a grid")
    images.add_argument("--allow-missing", action="store_true", help="with --images: count missing grids, go on")
    images.add_argument("--num-images", type=int, default=4, help="images of a prompt; the benchmark draws 4")
    images.add_argument("--seed", type=int, default=0)
    add_sampling_arguments(made.add_argument_group("sampling", SAMPLING_HELP))
    scoring = made.add_argument_group("scorer")
    scoring.add_argument("--vqa-model", metavar="PATH", help="BLIP-VQA, ViLT, a chat model, or mplug (the official)")
    scoring.add_argument("--vqa-kind", help="blip, vilt, chat or mplug; read from its configuration unless given")
    scoring.add_argument("--vqa-batch-size", type=int, default=16)
    scoring.add_argument("--allow-self-scoring", action="store_true", help="let the model score its own images")
    known = scoring.add_mutually_exclusive_group()
    known.add_argument("--sanity-images", metavar="DIR", help="with sanity_images.jsonl: image, question, answer")
    known.add_argument("--no-sanity-check", action="store_true", help="score without known images")
    made.add_argument("--device", help="cpu, cuda, ...; a GPU where there is one")
    made.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    add_run_arguments(made)
    return made


def _check(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        raise UserError("--output DIR is not given: images, answers and scores are kept there.")
    if (arguments.dpg_csv is None) == (arguments.prompts is None):
        raise UserError(f"Give either --dpg-csv FILE ({GET_CSV}), to draw and ask, or --prompts FILE, to draw only.")
    if (arguments.dpg_csv is None) != (arguments.vqa_model is None):
        raise UserError("A VQA model and questions need each other: give --dpg-csv and --vqa-model together.")
    if arguments.images is not None and (arguments.resolution is None or arguments.dpg_csv is None):
        raise UserError("--images needs --resolution, the side of one image of a grid, and --dpg-csv.")
    for name in ("num_images", "limit", "resolution", "vqa_batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
