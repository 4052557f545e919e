"""The command that runs the understanding benchmarks on a model: `unimm eval und`, eval/lmms.py."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, recorded_arguments
from unimm.evaluation.runs.store import processes
from unimm.evaluation.understanding.run import (
    HUB_TASKS,
    SHAPES_TASKS,
    UnderstandingPlan,
    evaluate_understanding,
    require_lmms_eval,
)
from unimm.mllm import load
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parse the arguments, run the benchmarks, and report the scores.

    Raises:
        UserError: invalid arguments, or lmms-eval is not installed.
    """
    arguments = parse_run(_parser(description), argv, bench=(*HUB_TASKS, *SHAPES_TASKS))
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


def _parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=None if description else "unimm eval und",
        description=description or __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", help="a unified model; the default comes with the library")
    tasks = ",".join(HUB_TASKS)
    made.add_argument("--tasks", default=tasks, help=f"default {tasks}; also {','.join(SHAPES_TASKS)}")
    made.add_argument("--data", metavar="DIR", help="a folder with MME, POPE, GQA, textvqa, ...; the hub unless given")
    made.add_argument(
        "--hub-owner", default=UnderstandingPlan.hub_owner, help="of the repositories; default %(default)s"
    )
    made.add_argument("--limit", type=int, help="the first N documents of each task")
    for name in ("batch_size", "default_max_new_tokens", "questions", "seed"):
        default = getattr(UnderstandingPlan, name)
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    made.add_argument("--device", help="cpu, cuda, ...; a GPU where there is one")
    made.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    add_run_arguments(made)
    made.set_defaults(output="runs/und")
    return made


def _lines(scores: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield one line per number, nested names joined by dots."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"  {prefix}{name:<40} {', '.join(value) or 'none'}"
        elif value is not None:
            yield f"  {prefix}{name:<40} {value:10.4f}"
