"""`unimm atlas`: a page of what each id of an image tokenizer stands for."""

import argparse
from pathlib import Path

from unimm.commands.options import add_json
from unimm.commands.shared import quiet_libraries
from unimm.config.argument_types import whole_number
from unimm.errors import UserError
from unimm.runs.provenance import check_output
from unimm.runs.report import Report

NUM_IMAGES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a model or a tokenizer (default: the embedded model)"
    )
    parser.add_argument("--data", default="shapes", metavar="SOURCE", help="images: a folder, a parquet file or shapes")
    parser.add_argument("--num-images", type=whole_number, metavar="N", help=f"default: {NUM_IMAGES}, or all of fewer")
    parser.add_argument("--output", default="atlas", metavar="FOLDER", help="default: atlas")


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Write a page of what each id of an image tokenizer looks like, and where and how often it is used."""
    if arguments.num_images == 0:
        raise UserError("--num-images is 0: an atlas needs at least one image.")
    from unimm.atlas import PAGE_NAME, collect, write_page
    from unimm.evaluation.runs.evaluated_model import load_evaluated_model
    from unimm.evaluation.runs.image_sets import image_set

    page = Path(arguments.output) / PAGE_NAME
    check_output(page, "page")
    images = image_set(arguments.data, arguments.num_images or (NUM_IMAGES if arguments.data == "shapes" else None))
    if arguments.num_images is None and len(images) > NUM_IMAGES:
        images = image_set(arguments.data, NUM_IMAGES)
    quiet_libraries()
    with report.timed("load"):
        evaluated = load_evaluated_model(arguments.model)
    skipped: list[str] = []
    with report.timed("atlas"):
        atlas = collect(
            evaluated.tokenizer, evaluated.image_processor, images, bad=lambda name, error: skipped.append(name)
        )
    if not atlas.count:
        raise UserError(f"{arguments.data} has no image that can be read: all {len(skipped)} were left out.")
    title = Path(arguments.model).name if arguments.model else "the embedded model"
    write_page(page, atlas, title=title, source=Path(arguments.data).name)
    report.add(
        model=arguments.model or "default",
        output=str(page),
        images=atlas.count,
        unreadable=skipped,
        codes=len(atlas.usage.counts),
        used=len(atlas.usage.counts) - atlas.usage.dead,
        perplexity=round(atlas.usage.perplexity, 2),
    )
    left_out = f", {len(skipped)} unreadable images left out" if skipped else ""
    report.say(
        f"{page}  ({atlas.usage.use:.1%} of {len(atlas.usage.counts)} codes used in {atlas.count} images{left_out})"
    )
