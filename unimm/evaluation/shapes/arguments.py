"""Arguments of the evaluation on the shapes data set (`unimm eval shapes`, eval/shapes.py)."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimm.errors import UserError
from unimm.evaluation.runs.arguments import add_run_arguments, parse_run, suite_parser
from unimm.runs.provenance import check_output
from unimm.sampling import SAMPLING_HELP, add_sampling_arguments, sampling_options

BENCH = "shapes"
PARTS = ("reconstruction", "chat", "generation")
"""Measured by default."""
ALL_PARTS = (*PARTS, "edits", "interleaved", "phrasing")


@dataclass(frozen=True)
class ShapesPlan:
    """Sizes of the evaluation; scenes, questions, prompts and sampling are functions of `seed`.

    Args:
        num_scenes: images that are reconstructed and compared.
        codebook_scenes: images whose ids are counted, including the compared ones.
        questions: questions per kind; a tenth of it per kind of phrasing.
        prompts: prompts per tag, and as many with a withheld pair; edits per kind, interleaved answers, and two fifths
            of it per kind of phrasing, with one image each.
        images_per_prompt: images drawn per prompt.
        batch_size: images or questions per forward; drawn images do not depend on it.
        sampling: settings of `ImageSampling` that override the checkpoint's defaults.
    """

    num_scenes: int = 500
    codebook_scenes: int = 2000
    questions: int = 300
    prompts: int = 50
    images_per_prompt: int = 4
    seed: int = 0
    batch_size: int = 64
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = ("num_scenes", "codebook_scenes", "questions", "prompts", "images_per_prompt", "batch_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def prompts_at_once(self) -> int:
        """Return the number of prompts per forward."""
        return max(1, self.batch_size // self.images_per_prompt)

    def rng(self, *names: str) -> np.random.Generator:
        """Return the generator of one part; training uses small seeds, so its scenes never coincide with these."""
        return np.random.default_rng([self.seed, self.number(*names)])

    def number(self, *names: str) -> int:
        """Hash (seed, names) to a 62-bit number."""
        text = "/".join(("shapes evaluation", str(self.seed), *names))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = suite_parser("shapes", description, __doc__)
    parser.add_argument("--model", help="a unified model or an image tokenizer; the default comes with the library")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {','.join(ALL_PARTS)}")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    parser.add_argument("--rows", metavar="FILE", help="write one JSON line per image and question")
    for name in ("num_scenes", "codebook_scenes", "questions", "prompts", "images_per_prompt", "batch_size", "seed"):
        default = getattr(ShapesPlan, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    add_sampling_arguments(parser.add_argument_group("sampling", SAMPLING_HELP))
    add_run_arguments(parser)
    arguments = parse_run(parser, argv, bench=BENCH)
    sampling_options(arguments)
    arguments.parts = [part.strip() for part in arguments.parts.split(",")]
    if unknown := [part for part in arguments.parts if part not in ALL_PARTS]:
        raise UserError(f"--parts names {', '.join(unknown)}; the parts are {', '.join(ALL_PARTS)}.")
    if arguments.rows is not None and not Path(arguments.rows).absolute().parent.is_dir():
        raise UserError(f"--rows {arguments.rows}: its folder does not exist.")
    if arguments.rows is not None:
        check_output(arguments.rows, "rows")
    return arguments
