"""The strict detector of the shapes data set as a reward (`unimm.data.shapes.strict`)."""

from collections.abc import Sequence

from PIL import Image

from unimm.evaluation.shapes.run import refusals
from unimm.rewards.base import Metadata, require_rules


class StrictShapesReward:
    """1 if the image shows exactly its prompt in crisp shapes, and nothing else, else 0."""

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return 1.0 or 0.0 for each image. Raises UserError for metadata without rules."""
        require_rules(metadata, "shapes_strict")
        return [float(not refusals(rules, image)) for rules, image in zip(metadata, images, strict=True)]
