"""`unimm reconstruct`: an image through the tokenizer and back."""

import argparse

from unimm.commands.options import add_json, add_model
from unimm.commands.shared import quiet_libraries, saved
from unimm.data.image_files import check_image_output
from unimm.data.images import load_image
from unimm.runs.report import Report

RECONSTRUCTION = "reconstruction.png"
"""Default output name; an existing file is never replaced, the next free number is used instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--output", metavar="FILE", help=f"default: {RECONSTRUCTION}, or a free number of it")


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Encode an image to ids and decode it again."""
    image = load_image(arguments.image)
    check_image_output(arguments.output or RECONSTRUCTION)
    from unimm.evaluation.reconstruction.one_image import reconstruct_image
    from unimm.evaluation.runs.evaluated_model import load_evaluated_model

    quiet_libraries()
    with report.timed("load"):
        evaluated = load_evaluated_model(arguments.model)
    with report.timed("per_image"):
        result = reconstruct_image(evaluated.tokenizer, evaluated.image_processor, image)
    quality = round(result.psnr, 3)
    (output,) = saved([result.image], arguments.output, RECONSTRUCTION)
    report.add(
        model=arguments.model or "default",
        image=str(arguments.image),
        output=str(output),
        ids=result.ids.size,
        psnr=quality,
    )
    report.say(f"{output}  ({result.ids.size} ids, {quality:.1f} dB)")
