"""Try out what `attach` promises on every pair of a host family and an encoder family.

    python eval/hosts.py --json hosts.json
    python eval/hosts.py --hosts llava,internvl --encoders siglip_vision_model

Tiny random models from the real configuration classes; a minute or two on two cores. `--json FILE` writes {"rows":
[{host, encoder, check: true/false, ...}], "ok": bool}; a check that could not be tried says why in a word. Exit code 1
when one failed.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from transformers.utils import logging

from unimm.benchmarks.hosts import ENCODER_FAMILIES, HOST_FAMILIES, try_pairs
from unimm.errors import UserError, run_main
from unimm.provenance import git_commit
from unimm.report import Report

LABELS = ("host", "encoder", "own_encoder")  # of a row; everything else is a check


def chosen(given: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = known if given is None else tuple(name.strip() for name in given.split(","))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} names {', '.join(unknown)}; known are {', '.join(known)}.")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", help=f"which of {', '.join(HOST_FAMILIES)}; default: all")
    parser.add_argument("--encoders", help=f"which of {', '.join(ENCODER_FAMILIES)}; default: all")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    hosts = chosen(arguments.hosts, HOST_FAMILIES, "--hosts")
    encoders = chosen(arguments.encoders, ENCODER_FAMILIES, "--encoders")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder, report.timed("all"):
        rows = list(try_pairs(hosts, encoders, Path(folder)))
    for row in rows:
        checks = {name: value for name, value in row.items() if name not in LABELS}
        marks = " ".join(name if value is True else f"{name.upper()}={value}" for name, value in checks.items())
        report.say(f"{row['host']:<16} {row['encoder']:<22} {'own ' if row['own_encoder'] else '    '} {marks}")
    ok = all(value is not False for row in rows for name, value in row.items() if name not in LABELS)
    report.add(rows=rows, ok=ok, commit=git_commit())
    report.write()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(run_main(main, name="hosts"))
