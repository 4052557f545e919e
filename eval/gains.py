"""Compare two evaluations on the shapes data set row by row: gains with 95 % intervals.

    python eval/shapes.py --parts generation,chat --rows before.jsonl
    python eval/shapes.py --model runs/shapes/grpo --parts generation,chat --rows after.jsonl
    python eval/gains.py before.jsonl after.jsonl

Prints before, after and their difference for drawings (overall, the mean of the six tags, and prompts with a withheld
pair) by the first and by the strict detector, and for answers. Samples of one prompt are resampled together.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimm.errors import UserError, run_main
from unimm.evaluation.metrics.bootstrap import bootstrap_mean, paired_bootstrap
from unimm.evaluation.shapes.run import WITHHELD

Row = dict[str, Any]
SCORES = {
    "drawings: overall": ("generation", "correct", False),
    "drawings: overall, strict": ("generation", "strict", False),
    "drawings: withheld pairs": ("generation", "correct", True),
    "drawings: withheld pairs, strict": ("generation", "strict", True),
    "answers": ("chat", "correct", False),
}
"""{name: (part, verdict, whether of the prompts with a withheld pair)}."""


def read_rows(path: Path) -> dict[tuple[str, int], Row]:
    """Read the rows that `eval/shapes.py --rows` wrote, by item and sample.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {(row["item"], row["sample"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no rows of eval/shapes.py ({type(error).__name__}: {error}).") from None


def compare(before: dict[tuple[str, int], Row], after: dict[tuple[str, int], Row]) -> dict[str, list[Any]]:
    """Return {score: [before, after, difference]} with intervals, of the scores that both runs have.

    Raises:
        UserError: the runs scored different samples.
    """
    if before.keys() != after.keys():
        raise UserError(
            f"The runs scored {len(before)} and {len(after)} samples, not the same ones: give both the same options."
        )
    found = {}
    for name, (part, field, withheld) in SCORES.items():
        keys = [key for key in before if key[0].startswith(f"{part}/")]
        keys = [key for key in keys if (before[key].get("group") == WITHHELD) == withheld]
        if keys:
            a, b = ([float(rows[key][field]) for key in keys] for rows in (before, after))
            about = [key[0] for key in keys], [before[key].get("group", before[key].get("kind")) for key in keys]
            found[name] = [bootstrap_mean(a, *about), bootstrap_mean(b, *about), paired_bootstrap(a, b, *about)]
    return found


def _text(found: Any, sign: str) -> str:
    interval = "" if found.low is None else f" [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"
    return f"{found.value:{sign}.3f}{interval}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="rows of the first model")
    parser.add_argument("after", type=Path, help="rows of the second model")
    arguments = parser.parse_args(argv)
    for name, results in compare(read_rows(arguments.before), read_rows(arguments.after)).items():
        before, after, gain = (_text(each, sign) for each, sign in zip(results, ("", "", "+"), strict=True))
        print(f"{name:34} {before:22} {after:22} {gain}")


if __name__ == "__main__":
    sys.exit(run_main(main, name="gains"))
