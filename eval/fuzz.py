"""Fuzz unimm with randomly damaged images, YAML, JSON, tar files and checkpoints, and with generations of random
settings, and count the outcomes.

    PYTHONPATH=. python eval/fuzz.py                                 4600 inputs, minutes on two cores: make fuzz
    PYTHONPATH=. python eval/fuzz.py --only yaml --first 17 --count 1    one input again

Every input is a function of its surface (input type) and number. Outcomes: it is used normally (clean), it raises a
one-sentence UserError (refused), or anything else (traceback: a defect, as is exceeding `--seconds`). Leftover files
are counted too. The exit code is 1 if there was a defect.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from tests.fuzz_surfaces import SURFACES, Surface, cleared
from unimm.errors import UserError, one_line, run_main
from unimm.runs.report import Report

OUTCOMES = ("clean", "refused", "traceback", "leftover files")
MEMORY = 16 * 2**30
LONGEST_SENTENCE = 1500


class TooSlow(BaseException):
    """An input exceeded its time limit. A BaseException, so that no `except Exception` under test swallows it."""


def outcome_of(surface: Surface, folder: Path, seconds: int) -> tuple[str, str]:
    """Use the input in `folder` and return the outcome and, for a defect, its location."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {seconds} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        surface.use(folder)
    except UserError as error:
        if "\n" in str(error).strip() or len(str(error)) > LONGEST_SENTENCE:
            return "traceback", f"a message of {len(str(error))} characters: {one_line(error)[:120]}"
        return "refused", ""
    except (Exception, TooSlow) as error:  # any exception is an outcome to count
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "unimm" in Path(frame.filename).parts]
        place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        return "traceback", f"{type(error).__name__}{place}: {one_line(error)[:120]}"
    finally:
        signal.alarm(0)
    return "clean", ""


def fuzz(name: str, work: Path, first: int, count: int, seconds: int, report: Report) -> Counter[str]:
    """Return the number of each outcome for `count` inputs of a surface."""
    surface = SURFACES[name][0](work / f"{name}-sound")
    folder, outcomes = work / "input", Counter[str](dict.fromkeys(OUTCOMES, 0))
    for number in tqdm(range(first, first + count), desc=name, leave=False, disable=None):
        what = surface.damage(random.Random(f"{name} {number}"), cleared(folder))
        before = _files(work)
        outcome, where = outcome_of(surface, folder, seconds)
        outcomes[outcome] += 1
        if where:
            report.say(f"{name} {number} ({what}): {where}")
        if left := sorted(_files(work) - before):
            outcomes["leftover files"] += len(left)
            report.say(f"{name} {number} ({what}): left {left[0]}")
            cleared(folder)
    return outcomes


def _files(work: Path) -> set[str]:
    """Return the files in the work folder, which is also the current directory, except caches."""
    return {str(path.relative_to(work)) for path in work.rglob("*") if path.is_file() and "cache" not in path.parts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SURFACES), action="append", help="these surfaces; repeatable")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default %(default)s)")
    parser.add_argument("--count", type=int, help="inputs of each surface (default: the surface's own)")
    parser.add_argument("--seconds", type=int, default=60, help="longest that one may take (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the counts, - for standard output")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json and os.path.abspath(arguments.json))
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    counts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNIMM_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        for name in arguments.only or SURFACES:
            with report.timed(name):
                count = arguments.count or SURFACES[name][1]
                counts[name] = fuzz(name, Path(folder), arguments.first, count, arguments.seconds, report)
        os.chdir("/")
    report.say(f"{'':<12}" + "".join(f"{outcome:>16}" for outcome in OUTCOMES))
    for name, found in counts.items():
        report.say(f"{name:<12}" + "".join(f"{found[outcome]:>16}" for outcome in OUTCOMES))
    report.add(counts={name: dict(found) for name, found in counts.items()})
    report.write()
    defects = sum(found["traceback"] + found["leftover files"] for found in counts.values())
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(run_main(main, name="fuzz"))
