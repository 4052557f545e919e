"""GenEval's rules as a reward: over a detector of COCO's classes and a CLIP that names colors, or over the detector of
the shapes data set (`unimm.evaluation.geneval.scorers`)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from unimm.evaluation.geneval.color_votes import load_color_voter
from unimm.evaluation.geneval.detector import load_detector
from unimm.evaluation.geneval.rules import Thresholds
from unimm.evaluation.geneval.scorers import DetectorScorer, Scorer
from unimm.rewards.base import Metadata, require_rules


class GenEvalReward:
    """1 if the image shows its prompt by GenEval's rules and this scorer, else 0."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @classmethod
    def load(cls, detector: str | Path, clip: str | Path) -> "GenEvalReward":
        """Load a Mask2Former and a CLIP from their folders, as `unimm eval geneval` does."""
        place = {"device": torch.device("cuda" if torch.cuda.is_available() else "cpu"), "dtype": torch.float32}
        thresholds = Thresholds()
        lowest = min(thresholds.threshold, thresholds.counting_threshold)
        found = load_detector(detector, min_score=lowest, **place)
        return cls(DetectorScorer(found, load_color_voter(clip, **place), thresholds))

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return 1.0 or 0.0 for each image. Raises UserError for metadata without rules."""
        require_rules(metadata, "geneval")
        found = self.scorer.detections([image.convert("RGB") for image in images], [dict(each) for each in metadata])
        return [float(self.scorer.verdict(rules, each).correct) for rules, each in zip(metadata, found, strict=True)]
