"""The two detectors of the shapes data set as rewards (`unimm.data.shapes.detector`, `unimm.data.shapes.strict`).

Metadata with an `Edit` under "edit" belong to the edited image of a scene, others hold GenEval's rules. Many images are
read by several processes if the machine has processors to spare: beside a GPU, reading takes longer than drawing.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

from PIL import Image

from unimm.data.shapes.detector import background_of, detect
from unimm.data.shapes.edits import Edit, Located
from unimm.data.shapes.strict import read_strictly
from unimm.evaluation.geneval.scorers import ShapesScorer
from unimm.evaluation.shapes.run import refusals
from unimm.rewards.base import Metadata, require_rules
from unimm.rewards.detectors import GenEvalReward


class ShapesReward:
    """1 if the first detector finds the prompt in the image by GenEval's rules, else 0; for an edit see
    `edit_reward`."""

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return 0.0 to 1.0 for each image. Raises UserError for metadata without rules."""
        return _mapped(_score, prompts, metadata, images)


class StrictShapesReward:
    """1 if the image shows exactly its prompt in crisp shapes, and nothing else, else 0; for an edit see
    `edit_reward`."""

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return 0.0 to 1.0 for each image. Raises UserError for metadata without rules."""
        require_rules([rules for rules in metadata if "edit" not in rules], "shapes_strict")
        return _mapped(_score_strictly, metadata, images)


_DRAWINGS = GenEvalReward(ShapesScorer())


def _score(prompt: str, rules: Metadata, image: Image.Image) -> float:
    if "edit" in rules:
        return edit_reward(rules["edit"], detect(image), background_of(image))
    return _DRAWINGS.score([prompt], [rules], [image])[0]


def _score_strictly(rules: Metadata, image: Image.Image) -> float:
    if "edit" in rules:
        return edit_reward(rules["edit"], read_strictly(image).objects, background_of(image))
    return float(not refusals(rules, image))


def _mapped(score: Callable[..., float], *columns: Sequence[Any]) -> list[float]:
    """Return the score of each row, computed by several processes if there are many rows and processors."""
    pool, rows = _pool(), len(columns[0])
    if pool is None or rows < _WORTH_A_POOL:
        return [score(*row) for row in zip(*columns, strict=True)]
    return list(pool.map(score, *columns, chunksize=-(-rows // _PROCESSES)))


@cache
def _pool() -> ProcessPoolExecutor | None:
    """Return the processes that read images, forked: they start at once and touch neither torch nor a GPU."""
    spare = (os.cpu_count() or 1) - _PROCESSES
    return ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("fork")) if spare >= _PROCESSES else None


_PROCESSES, _WORTH_A_POOL = 6, 32


def edit_reward(edit: Edit, found: Sequence[Located], background: str) -> float:
    """Return the mean of three scores: 1 if the instruction is fulfilled; the share of the objects it does not name
    that are found where they were; 1 if exactly the objects of the edited scene are found, on its background.

    An image that is copied unchanged gets a third, a new one that fulfills the instruction alone another.
    """
    kept = edit.unchanged(found)
    wanted = Counter((each.color, each.shape) for each in edit.target.objects)
    exact = Counter((each.color, each.shape) for each in found) == wanted and background == edit.target.background
    return (edit.holds(found, background) + (sum(kept) / len(kept) if kept else 1.0) + exact) / 3
