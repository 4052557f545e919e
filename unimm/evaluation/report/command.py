"""The command that writes the HTML report of a finished run: `unimm eval report`. Loads no model."""

import argparse
from collections.abc import Sequence

from unimm.evaluation.report.arguments import parse
from unimm.evaluation.runs.html_report import span, write_report
from unimm.evaluation.runs.records import read_summary
from unimm.runs.report import Report


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run(parse(argv))


def run(arguments: argparse.Namespace) -> None:
    """Write the HTML report, and print its scores."""
    report = Report(arguments.json)
    with report.timed("report"):
        scores = write_report(arguments.folder, arguments.output, arguments.against)
    rows = []
    for score in scores:
        name = f"{score.part} {score.name}".strip()
        report.say(f"{name:<40} {score.interval.value:10.4f}  {span(score.interval)}")
        tags = {tag: interval._asdict() for tag, interval in score.by_tag.items()}
        rows.append({"part": score.part, "name": score.name, **score.interval._asdict(), "tags": tags})
    distances = read_summary(arguments.folder).get("distances")
    for name, value in (distances or {}).items():
        report.say(f"{name:<40} {', '.join(value) if isinstance(value, list) else format(value, '10.4f')}")
    report.add(scores=rows, distances=distances, page=arguments.output)
    report.say(arguments.output)
    report.write()
