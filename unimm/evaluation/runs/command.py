"""The command that writes the HTML report of a finished run: `unimm eval report`. Loads no model."""

import argparse
from collections.abc import Sequence

from unimm.evaluation.runs.html_report import span, write_report
from unimm.evaluation.runs.records import read_summary
from unimm.runs.report import Report


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, write the HTML report, and print its scores."""
    parser = argparse.ArgumentParser(prog="unimm eval report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="of a finished run")
    parser.add_argument("--against", metavar="DIR2", help="another run of the same benchmark, for paired differences")
    parser.add_argument("--output", required=True, metavar="FILE", help="the page, one HTML file")
    parser.add_argument("--json", metavar="FILE", help="write the scores, - for standard output")
    arguments = parser.parse_args(argv)
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
