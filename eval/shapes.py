"""Measure a model on the picture world: reconstruction, answers, drawings.

    python eval/shapes.py                                                       # the embedded default
    python eval/shapes.py --model runs/shapes/t2i --json shapes.json
    python eval/shapes.py --model runs/shapes/stage1 --parts reconstruction     # an image tokenizer alone

`--json FILE` writes reconstruction {agreement, psnr, psnr_mean_color, ssim, codebook_use, perplexity}, chat
{existence, color, count, position}, generation {the six GenEval tags, overall, withheld}, seconds, seed and commit;
`--rows FILE` every single verdict.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unimm.benchmarks.shapes import (
    PARTS,
    ShapesPlan,
    evaluate_chat,
    evaluate_generation,
    evaluate_reconstruction,
)
from unimm.benchmarks.subject import Subject, load_subject
from unimm.errors import UserError, run_main
from unimm.provenance import git_commit, write_atomically
from unimm.report import Report

MEASURES: dict[str, Callable[[Subject, ShapesPlan], tuple[dict[str, float], list[dict[str, Any]]]]] = {
    "reconstruction": lambda subject, plan: evaluate_reconstruction(subject.tokenizer, subject.image_processor, plan),
    "chat": lambda subject, plan: evaluate_chat(subject.model, subject.processor, plan),
    "generation": lambda subject, plan: evaluate_generation(subject.model, subject.processor, plan),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a unified model or an image tokenizer; the default comes with the library")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {','.join(PARTS)}")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    parser.add_argument("--rows", metavar="FILE", help="write one JSON line per picture and question")
    for name in ("num_scenes", "codebook_scenes", "questions", "prompts", "images_per_prompt", "batch_size", "seed"):
        default = getattr(ShapesPlan, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    for name in ("guidance_scale", "temperature"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="of drawing; default: the checkpoint's own")
    arguments = parser.parse_args(argv)
    arguments.parts = [part.strip() for part in arguments.parts.split(",")]
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        raise UserError(f"--parts names {', '.join(unknown)}; the parts are {', '.join(PARTS)}.")
    if arguments.rows is not None and not Path(arguments.rows).absolute().parent.is_dir():
        raise UserError(f"--rows {arguments.rows}: its folder does not exist.")
    return arguments


def plan_of(arguments: argparse.Namespace) -> ShapesPlan:
    given = vars(arguments)
    sampling = {name: given[name] for name in ("guidance_scale", "temperature") if given[name] is not None}
    sizes = {name: given[name] for name in ShapesPlan.__dataclass_fields__ if name in given}
    return ShapesPlan(**sizes, sampling=sampling)


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for part, values in scores.items():
        lines += [part, *(f"  {name:<16} {value:8.3f}" for name, value in values.items())]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    plan, report = plan_of(arguments), Report(arguments.json)
    with report.timed("load"):
        subject = load_subject(arguments.model)
    if subject.model is None and arguments.parts != ["reconstruction"]:
        raise UserError(
            f"{arguments.model} is an image tokenizer and cannot answer or draw: add --parts reconstruction."
        )
    rows = []
    for part in arguments.parts:
        with report.timed(part):
            scores, judged = MEASURES[part](subject, plan)
        rows += [{"part": part, **row} for row in judged]
        report.say(table({part: scores}))
        report.add(**{part: scores})
    report.add(seed=plan.seed, commit=git_commit())
    if arguments.rows is not None:
        write_atomically(arguments.rows, "".join(json.dumps(row) + "\n" for row in rows))
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="shapes"))
