"""`unimm detach`: the host model of a unified model."""

import argparse

from unimm.commands.options import add_json, add_model, add_new_folder, add_positional_model
from unimm.commands.shared import load_model, new_folder
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    add_new_folder(parser)
    add_positional_model(parser)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Restore the host model that an image tokenizer was attached to."""
    output = new_folder(arguments.output)
    from unimm.mllm.export import detach as detached
    from unimm.saving import save_whole

    model, processor = load_model(arguments.model, report)
    with report.timed("save"):
        host = detached(model)
        save_whole(output, host, processor.tokenizer)
    report.add(output=str(output), model_type=host.config.model_type)
    report.say(f"{output}  ({host.config.model_type})")
