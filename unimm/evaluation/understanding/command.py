"""The command that runs the understanding benchmarks on a model: `unimm eval und`, eval/lmms.py."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from unimm.evaluation.runs.arguments import recorded_arguments
from unimm.evaluation.runs.store import processes
from unimm.evaluation.understanding.arguments import UnderstandingPlan, parse
from unimm.evaluation.understanding.run import (
    evaluate_understanding,
    require_lmms_eval,
)
from unimm.mllm import load
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parse the arguments and run the command."""
    run(parse(argv, description))


def run(arguments: argparse.Namespace) -> None:
    """Run the benchmarks, and report the scores.

    Raises:
        UserError: invalid arguments, or lmms-eval is not installed.
    """
    report = Report(arguments.json if processes().is_main_process else None)
    given = {name: getattr(arguments, name) for name in UnderstandingPlan.__dataclass_fields__}
    plan = UnderstandingPlan(**{**given, "tasks": tuple(name.strip() for name in given["tasks"].split(","))})
    require_lmms_eval()
    with report.timed("load"):
        model, processor = load(arguments.model, arguments.device)
    with report.timed("understanding"):
        found = evaluate_understanding(model, processor, plan, arguments.output, recorded_arguments(arguments))
    if not processes().is_main_process:
        return
    for name, result in found.items():
        report.say("\n".join([name, *_lines(result["scores"]), *_lines(result["lmms_eval"], "lmms-eval: ")]))
    report.add(understanding=found, plan=asdict(plan), model=arguments.model or "default", commit=git_commit())
    report.write()


def _lines(scores: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield one line per number, nested names joined by dots."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"  {prefix}{name:<40} {', '.join(value) or 'none'}"
        elif value is not None:
            yield f"  {prefix}{name:<40} {value:10.4f}"
