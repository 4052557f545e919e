"""`unimm export`: checkpoints that load without unimm."""

import argparse

from unimm.commands.options import add_json, add_model, add_new_folder, add_positional_model
from unimm.commands.shared import load_model, new_folder
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--understanding", action="store_true", help="a stock LLaVA or InternVL with the plain encoder")
    kind.add_argument("--generation", action="store_true", help="the language model with image ids, and the decoder")
    add_new_folder(parser)
    add_positional_model(parser)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Export a checkpoint that loads without unimm: one that understands images, or one that generates image ids."""
    output = new_folder(arguments.output)
    from unimm.mllm.export import save_generation, stock_understanding
    from unimm.saving import save_whole

    model, processor = load_model(arguments.model, report)
    with report.timed("save"):
        if arguments.understanding:
            stock, reader = stock_understanding(model, processor)
            save_whole(output, stock, reader)
        else:
            stock = save_generation(model, processor, output)
    report.add(output=str(output), model_type=stock.config.model_type)
    report.say(f"{output}  ({stock.config.model_type})")
