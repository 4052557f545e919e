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
    import torch

    from unimm.evaluation.metrics.image_metrics import capped_psnr
    from unimm.evaluation.runs.evaluated_model import load_evaluated_model

    quiet_libraries()
    with report.timed("load"):
        evaluated = load_evaluated_model(arguments.model)
    tokenizer, image_processor = evaluated.tokenizer, evaluated.image_processor
    with torch.inference_mode(), report.timed("per_image"):
        pixel_values = image_processor([image], return_tensors="pt")["pixel_values"].to(tokenizer.device)
        ids = tokenizer.encode(pixel_values).ids
        pixels = tokenizer.decode(ids).float()
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    quality = round(capped_psnr(pixels.cpu(), pixel_values.float().cpu() * std + mean).item(), 3)
    (output,) = saved(image_processor.postprocess(pixels), arguments.output, RECONSTRUCTION)
    report.add(
        model=arguments.model or "default",
        image=str(arguments.image),
        output=str(output),
        ids=ids.numel(),
        psnr=quality,
    )
    report.say(f"{output}  ({ids.numel()} ids, {quality:.1f} dB)")
