"""Arguments of the understanding benchmarks (`unimm eval und`, eval/lmms.py)."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unimm.errors import UserError
from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, suite_parser

HUB_TASKS = ("mme", "pope", "gqa", "textvqa", "textvqa_ocr", "mmbench", "seed", "mmmu", "ai2d")
SHAPES_TASKS = ("shapes_mme", "shapes_pope")


@dataclass(frozen=True)
class UnderstandingPlan:
    """The benchmarks to run and their data.

    Args:
        tasks: names in HUB_TASKS or SHAPES_TASKS.
        data: a folder with one folder per benchmark; None loads them from the hub.
        hub_owner: owner of the benchmarks' repositories on the hub.
        limit: use only the first `limit` documents of each task.
        batch_size: conversations per forward pass; the answers do not depend on it.
        default_max_new_tokens: maximum answer length if a task does not set one.
        questions: number of questions about the shapes data set, for SHAPES_TASKS.
        seed: seed of these questions.
    """

    tasks: tuple[str, ...] = HUB_TASKS
    data: str | None = None
    hub_owner: str = "lmms-lab-encoder"
    limit: int | None = None
    batch_size: int = 8
    default_max_new_tokens: int = 64
    questions: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        known = (*HUB_TASKS, *SHAPES_TASKS)
        if unknown := [name for name in self.tasks if name not in known]:
            raise UserError(f"There is no understanding task {', '.join(unknown)}; there are {', '.join(known)}.")
        if len(set(self.tasks)) != len(self.tasks) or not self.tasks:
            raise UserError(f"Name at least one task and each of them once, not {', '.join(self.tasks) or 'none'}.")
        for name in ("limit", "batch_size", "default_max_new_tokens", "questions"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if self.data is not None and not Path(self.data).is_dir():
            raise UserError(f"There is no folder {self.data} with the benchmarks' data.")
        if self.limit is not None and self.limit % 2 and {"mme", "shapes_mme"} & set(self.tasks):
            raise UserError(f"limit is {self.limit}: MME asks two questions about each image, give an even number.")


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    return parse_run(_parser(description), argv, bench=(*HUB_TASKS, *SHAPES_TASKS))


def _parser(description: str | None) -> argparse.ArgumentParser:
    made = suite_parser("und", description, __doc__)
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
