"""`unimm attach`: an image tokenizer joined with a host model."""

import argparse

from unimm.commands.options import add_json, add_new_folder
from unimm.commands.shared import new_folder, quiet_libraries
from unimm.config.argument_types import whole_number
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)
    parser.add_argument("host", metavar="HOST", help="a model folder or hub id")
    parser.add_argument("--image-tokenizer", required=True, metavar="PATH", help="a tokenizer folder or hub id")
    add_new_folder(parser)
    parser.add_argument("--row-init", choices=("random", "mean", "codebook"), default="random", help="of the new rows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the host's own")
    parser.add_argument(
        "--image-position-mode", choices=("1d", "2d"), default="1d", help="of drawn images; 2d is for Qwen-VL hosts"
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="S", help="of everything that is new")


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Attach an image tokenizer to a language or multimodal model, so that it takes and generates images."""
    output = new_folder(arguments.output)
    import torch

    from unimm.mllm import attach as attach_to
    from unimm.saving import save_whole

    quiet_libraries()
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with report.timed("attach"):
        model, processor = attach_to(
            arguments.host,
            arguments.image_tokenizer,
            row_init=arguments.row_init,
            dtype=dtype,
            image_position_mode=arguments.image_position_mode,
            seed=arguments.seed,
        )
    with report.timed("save"):
        save_whole(output, model, processor)
    untrained = model.attachment.untrained
    report.add(
        host=arguments.host,
        image_tokenizer=arguments.image_tokenizer,
        output=str(output),
        model_type=model.config.model_type,
        kept=model.attachment.kept,
        untrained=untrained,
    )
    report.say(model.attachment.sentence() + f"\n{output}")
