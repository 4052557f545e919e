"""`unimm convert`: a published checkpoint as a folder of this library."""

import argparse
from pathlib import Path

from unimm.commands.options import add_json, add_new_folder
from unimm.commands.shared import new_folder, quiet_libraries
from unimm.config.argument_types import whole_number
from unimm.conversion import LAYOUTS, check_options
from unimm.errors import require_place
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "layouts:\n" + "\n".join(f"  {name:<14} {what}" for name, what in LAYOUTS.items())
    parser.add_argument("layout", choices=LAYOUTS, metavar="LAYOUT", help=", ".join(LAYOUTS))
    parser.add_argument("file", metavar="FILE", help="the published file, .safetensors or .pt")
    add_new_folder(parser)
    parser.add_argument("--encoder", metavar="PATH", help="VFMTok's encoder (default: dinov2-reg-l-p14-518)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="the converted image tokenizer whose ids a GPT draws")
    parser.add_argument(
        "--image-size", type=whole_number, metavar="PX", help="LlamaGen's VQ: pixels a side (default: 256)"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Convert a published checkpoint of VFMTok, IDEAL or LlamaGen."""
    output = new_folder(arguments.output)
    for what, place in (("The checkpoint", arguments.file), ("The tokenizer", arguments.tokenizer)):
        require_place(what, place)
    options = {name: getattr(arguments, name) for name in ("encoder", "tokenizer", "image_size")}
    check_options(arguments.layout, **options)
    from unimm.conversion.convert import convert

    quiet_libraries()
    with report.timed("convert"):
        done = convert(arguments.layout, Path(arguments.file), output, **options)
    report.add(
        layout=arguments.layout,
        file=arguments.file,
        output=str(output),
        model_type=done.model.config.model_type,
        kept_under=done.key,
        tensors=done.tensors,
        weights=done.weights,
    )
    under = f', those of "{done.key}"' if done.key else ""
    report.say(f"{output}  ({done.model.config.model_type}: {done.tensors} tensors, {done.weights:,} weights{under})")
