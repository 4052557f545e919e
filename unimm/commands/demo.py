"""`unimm demo`: one page that shows what the model does."""

import argparse
from pathlib import Path

from unimm.commands.options import add_json, add_model
from unimm.commands.shared import load_model
from unimm.config.argument_types import whole_number
from unimm.runs.provenance import check_output
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    parser.add_argument(
        "--output", default="runs/demo", metavar="FOLDER", help="where the page goes (default: %(default)s)"
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="S", help="another seed, other scenes")


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Write an HTML page with reconstructions, answers and generated images; its path is printed last."""
    folder = Path(arguments.output)
    check_output(folder / "index.html", "page")
    from unimm.demo import DemoPlan, run_demo, write_page

    plan = DemoPlan.sample(arguments.seed)
    model, processor = load_model(arguments.model, report)
    result = run_demo(model, processor, plan)
    page = write_page(result, folder, title="unimm, first light", seed=plan.seed)
    report.seconds |= result.seconds
    report.add(page=str(page), seed=plan.seed, answers=result.score())
    report.say(str(page))
