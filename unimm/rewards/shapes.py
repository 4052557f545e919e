"""The two detectors of the shapes data set as rewards (`unimm.data.shapes.detector`, `unimm.data.shapes.strict`).

Metadata with an `Edit` under "edit" belong to the edited image of a scene, others hold GenEval's rules.
"""

from collections import Counter
from collections.abc import Sequence

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

    def __init__(self) -> None:
        self.drawings = GenEvalReward(ShapesScorer())

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return 0.0 to 1.0 for each image. Raises UserError for metadata without rules."""
        rows = zip(prompts, metadata, images, strict=True)
        return [
            edit_reward(rules["edit"], detect(image), background_of(image))
            if "edit" in rules
            else self.drawings.score([prompt], [rules], [image])[0]
            for prompt, rules, image in rows
        ]


class StrictShapesReward:
    """1 if the image shows exactly its prompt in crisp shapes, and nothing else, else 0; for an edit see
    `edit_reward`."""

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return 0.0 to 1.0 for each image. Raises UserError for metadata without rules."""
        require_rules([rules for rules in metadata if "edit" not in rules], "shapes_strict")
        return [
            edit_reward(rules["edit"], read_strictly(image).objects, background_of(image))
            if "edit" in rules
            else float(not refusals(rules, image))
            for rules, image in zip(metadata, images, strict=True)
        ]


def edit_reward(edit: Edit, found: Sequence[Located], background: str) -> float:
    """Return the mean of three scores: 1 if the instruction is fulfilled; the share of the objects it does not name
    that are found where they were; 1 if exactly the objects of the edited scene are found, on its background.

    An image that is copied unchanged gets a third, a new one that fulfills the instruction alone another.
    """
    kept = edit.unchanged(found)
    wanted = Counter((each.color, each.shape) for each in edit.target.objects)
    exact = Counter((each.color, each.shape) for each in found) == wanted and background == edit.target.background
    return (edit.holds(found, background) + (sum(kept) / len(kept) if kept else 1.0) + exact) / 3
