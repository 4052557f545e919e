"""`unimm merge`: a LoRA adapter and its base as one model."""

import argparse

from unimm.commands.options import add_json, add_new_folder
from unimm.commands.shared import new_folder, quiet_libraries
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)
    parser.add_argument("adapter", metavar="ADAPTER", help="the output folder of a recipe that ran with lora")
    add_new_folder(parser)
    parser.add_argument("--base", metavar="PATH", help="its base, where it has moved since")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the base's own"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Merge a LoRA adapter into its base model and save the result."""
    output = new_folder(arguments.output)
    from transformers import AutoProcessor

    from unimm.errors import reading
    from unimm.mllm import load
    from unimm.saving import save_whole
    from unimm.training.language_model.adapters import about_base, read_adapter

    quiet_libraries()
    base = arguments.base or about_base(arguments.adapter)["base"]
    with report.timed("load"):
        model, _ = load(base, device="cpu", dtype=arguments.dtype)
        with reading("The processor of the adapter", arguments.adapter):
            processor = AutoProcessor.from_pretrained(arguments.adapter)
    with report.timed("merge"):
        merged = read_adapter(model, arguments.adapter, base).merged()
    with report.timed("save"):
        save_whole(output, merged, processor)
    report.add(adapter=arguments.adapter, base=base, output=str(output), model_type=merged.config.model_type)
    report.say(f"{output}  ({merged.config.model_type}: {arguments.adapter} on {base})")
