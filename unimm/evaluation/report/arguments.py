"""Arguments of the command that writes the HTML report of a finished run (`unimm eval report`). It loads no model."""

import argparse
from collections.abc import Sequence


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(prog="unimm eval report", description=description or __doc__)
    parser.add_argument("folder", metavar="DIR", help="of a finished run")
    parser.add_argument("--against", metavar="DIR2", help="another run of the same benchmark, for paired differences")
    parser.add_argument("--output", required=True, metavar="FILE", help="the page, one HTML file")
    parser.add_argument("--json", metavar="FILE", help="write the scores, - for standard output")
    return parser.parse_args(argv)
