"""Say how ragged an edge may be for the two detectors of the shapes data set.

    python eval/wobble.py --json runs/wobble.json

Prints, for edges that are displaced at random, the median displacement in pixels and the share of images that the first
detector and the strict one read rightly, and the displacement at which each falls below one half.
"""

import argparse
import sys

from unimm.benchmarks.wobble import SMOOTHNESS, measure, refused_from
from unimm.errors import UserError, run_main
from unimm.provenance import git_commit
from unimm.report import Report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200, help="images of each amplitude; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    if arguments.scenes < 1:
        raise UserError(f"--scenes is {arguments.scenes}; it must be at least 1.")
    report = Report(arguments.json)
    with report.timed("wobble"):
        measured = measure(scenes=arguments.scenes, seed=arguments.seed)
    report.say(f"{'wobble (px)':>12} {'first':>7} {'strict':>7}")
    for row in measured:
        report.say(f"{row.wobble:12.2f} {row.first:7.3f} {row.strict:7.3f}")
    limits = {name: refused_from(measured, name) for name in ("first", "strict")}
    for name, limit in limits.items():
        shown = "more than was measured" if limit is None else f"{limit:.2f} px"
        report.say(f"the {name} detector accepts half of the images at a median displacement of {shown}")
    report.add(rows=[row._asdict() for row in measured], half_accepted_at=limits, smoothness=SMOOTHNESS)
    report.add(scenes=arguments.scenes, seed=arguments.seed, commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="wobble"))
