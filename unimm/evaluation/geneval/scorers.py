"""Scorers for GenEval: Mask2Former with a CLIP color classifier, or the shapes data set's analytic detector.

A scorer must first get known images right (`Scorer.check`): a detector on the wrong device or with the wrong
configuration returns numbers too, and nothing else would show that they are bad.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from unimm.data.shapes import SHAPES, TAGS, Scene, render, sample_prompt
from unimm.data.shapes.detector import detect
from unimm.data.shapes.prompts import scene_for
from unimm.english import with_article
from unimm.errors import UserError
from unimm.evaluation.geneval.color_votes import ColorVoter
from unimm.evaluation.geneval.detector import InstanceDetector, Segment
from unimm.evaluation.geneval.outlines import outlines
from unimm.evaluation.geneval.prompts import Metadata
from unimm.evaluation.geneval.rules import COCO_CLASSES, FoundObject, Thresholds, Verdict, select_objects, verdict
from unimm.evaluation.runs.sanity_checks import ABSENT, photographs

Detection = dict[str, Any]

PLAIN_COLORS = {"red": (230, 20, 20), "green": (20, 160, 40), "blue": (25, 50, 220)}
SANITY_SIZE = 224
MAJORITY = 0.5  # a color with a larger share of the vote is not a guess


class SanityImage(NamedTuple):
    """A known image for the sanity check: name, metadata to check it against, and the expected verdict."""

    name: str
    image: Image.Image
    metadata: Metadata
    expected: bool


class PlainVerdict(NamedTuple):
    """A verdict that ignores guessed colors, and the number of objects whose color was a guess."""

    correct: bool
    guessed: int


def color_is_known(detection: Mapping[str, Any]) -> bool:
    """Return whether a detection's color has more than half of the vote; True if there was no vote."""
    votes = detection.get("color_votes")
    return not votes or votes.get(detection.get("color"), 0.0) > MAJORITY


class Scorer:
    """Base class: detects objects in images and applies GenEval's rules to them."""

    name: str
    class_names: Sequence[str]
    thresholds: Thresholds

    def detections(self, images: Sequence[Image.Image], prompts: Sequence[Metadata]) -> list[list[Detection]]:
        """Return the detections of each upright RGB image: `label` (a class name), `box`, `score`, and `color` if the
        prompt asks for one; for the report also `outline` and `color_votes`, if the scorer has them."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the scorer's name, models and thresholds, to be recorded with every result."""
        raise NotImplementedError

    def weights(self) -> dict[str, str]:
        """Return the fingerprints of the models by role."""
        return {}

    def sanity_images(self) -> list[SanityImage]:
        """Return the scorer's built-in known images."""
        raise NotImplementedError

    def verdict(self, metadata: Mapping[str, Any], detections: Iterable[Mapping[str, Any]]) -> Verdict:
        """Apply the official rules."""
        return verdict(metadata, detections, class_names=self.class_names, **asdict(self.thresholds))

    def plain(self, metadata: Mapping[str, Any], detections: Iterable[Mapping[str, Any]]) -> PlainVerdict:
        """Apply the rules without guessed colors: the official rule takes the best of ten colors however close they
        are; here a color counts only with more than half of the vote."""
        known = [each if color_is_known(each) else {**each, "color": None} for each in detections]
        found = self.objects(metadata, known)
        colored = [rule for rule in metadata["include"] if rule.get("color")]
        scored = [each for rule in colored for each in found.get(rule["class"], [])[: rule["count"]]]
        return PlainVerdict(self.verdict(metadata, known).correct, sum(each.color is None for each in scored))

    def objects(
        self, metadata: Mapping[str, Any], detections: Iterable[Mapping[str, Any]]
    ) -> dict[str, list[FoundObject]]:
        """Return the detections that count for this prompt, per class."""
        options, limit = self.thresholds, self.thresholds.limit(metadata)
        return select_objects(
            detections, self.class_names, limit=limit, max_objects=options.max_objects, max_overlap=options.max_overlap
        )

    def check(self, sanity_images: Sequence[SanityImage]) -> int:
        """Score known images and return their number.

        Raises:
            UserError: there are none, a score is not finite, or a verdict is wrong.
        """
        if not sanity_images:
            raise UserError(f"{self.name} has no known image to score first: give --sanity-images FOLDER.")
        found = self.detections([each.image for each in sanity_images], [each.metadata for each in sanity_images])
        for known, detections in zip(sanity_images, found, strict=True):
            if not all(np.isfinite([each["score"], *each["box"]]).all() for each in detections):
                raise UserError(f"{self.name} gives scores that are not finite for {known.name}: nothing is scored.")
            scored = self.verdict(known.metadata, detections)
            if scored.correct != known.expected:
                said = "; ".join(scored.reasons) or "right"
                raise UserError(
                    f"{self.name} fails on an image that is known: of {known.name} it says of "
                    f"{known.metadata['prompt']!r}: {said}. Nothing is scored with it; check its weights and --device."
                )
        return len(sanity_images)


class ShapesScorer(Scorer):
    """The shapes data set's analytic detector. Its score is a geometric overlap, not a confidence, so every detection
    counts."""

    name = "shapes"
    class_names = SHAPES

    def __init__(self) -> None:
        self.thresholds = Thresholds(threshold=0.0, counting_threshold=0.0)

    def detections(self, images: Sequence[Image.Image], prompts: Sequence[Metadata]) -> list[list[Detection]]:
        return [[_plain(found.as_rule_input()) for found in detect(image)] for image in images]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "thresholds": asdict(self.thresholds)}

    def sanity_images(self) -> list[SanityImage]:
        """Return, for every tag, a correct image and an empty one; for positions also the correct one rotated by 180
        degrees."""
        rng, known = np.random.default_rng(0), list[SanityImage]()
        for tag in TAGS:
            prompt = sample_prompt(rng, tag, split="test")
            scene = scene_for(rng, prompt)
            image, rules = render(scene), prompt.metadata()
            known.append(SanityImage(f"a scene of {tag}", image, rules, True))
            empty = render(Scene(background=scene.background, objects=()))
            known.append(SanityImage("an empty image", empty, rules, False))
            if tag == "position":
                known.append(SanityImage("a scene turned round", ImageOps.flip(ImageOps.mirror(image)), rules, False))
        return known


class DetectorScorer(Scorer):
    """`geneval-hf`: Mask2Former detects objects, CLIP classifies the colors that a prompt asks about."""

    name = "geneval-hf"
    class_names = COCO_CLASSES

    def __init__(self, detector: InstanceDetector, voter: ColorVoter, thresholds: Thresholds | None = None) -> None:
        self.detector, self.voter, self.thresholds = detector, voter, thresholds or Thresholds()
        lowest = min(self.thresholds.threshold, self.thresholds.counting_threshold)
        if detector.min_score > lowest:
            raise ValueError(f"the detector drops scores below {detector.min_score}, the rules ask from {lowest}")

    def detections(self, images: Sequence[Image.Image], prompts: Sequence[Metadata]) -> list[list[Detection]]:
        found = self.detector.detect(images)
        return [self._described(*each) for each in zip(images, found, prompts, strict=True)]

    def describe(self) -> dict[str, Any]:
        colors = self.voter.describe() | {"background": self.voter.background, "crop": self.voter.crop}
        models = {"detector": self.detector.describe(), "colors": colors}
        return {"name": self.name, "thresholds": asdict(self.thresholds), **models}

    def weights(self) -> dict[str, str]:
        return {"detector": self.detector.fingerprint, "clip": self.voter.fingerprint}

    def sanity_images(self) -> list[SanityImage]:
        """Return three photographs from scikit-image (a cat, a person, a cup), each also with a class that it lacks.

        Raises:
            UserError: scikit-image is not installed, or the color classifier fails on plain colors.
        """
        images = photographs()
        self._check_plain_colors()
        known = []
        for name, image in images.items():
            for asked in (name, ABSENT):
                rules = {
                    "tag": "single_object",
                    "include": [{"class": asked, "count": 1}],
                    "prompt": f"a photo of {with_article(asked)}",
                }
                known.append(SanityImage(f"the photograph of a {name}", image, rules, asked == name))
        return known

    def _check_plain_colors(self) -> None:
        """Raise UserError unless plain red, green and blue images are classified as such."""
        whole = Segment(0, (0.0, 0.0, SANITY_SIZE, SANITY_SIZE), 1.0, np.ones((SANITY_SIZE, SANITY_SIZE), bool))
        for color, value in PLAIN_COLORS.items():
            (vote,) = self.voter.vote(Image.new("RGB", (SANITY_SIZE, SANITY_SIZE), value), [whole], "apple")
            if vote.color != color:
                raise UserError(
                    f"{self.voter.name} calls an image of plain {color} {vote.color}: no color is named with it."
                )

    def _described(self, image: Image.Image, segments: Sequence[Segment], prompt: Metadata) -> list[Detection]:
        """Return all detections; those above the threshold have an outline, and those whose color the prompt asks about
        have the vote on it."""
        # Compare in float32 as `rules` does, so that both select the same detections.
        limit = np.float32(self.thresholds.limit(prompt))
        above = [index for index, each in enumerate(segments) if np.float32(each.score) > limit]
        rows: list[Detection] = [  # the best first
            {"label": COCO_CLASSES[each.label], "box": list(each.box), "score": each.score} for each in segments
        ]
        for index in above:
            rows[index]["outline"] = outlines(segments[index].mask)
        for name in dict.fromkeys(rule["class"] for rule in prompt["include"] if "color" in rule):
            asked = [index for index in above if rows[index]["label"] == name][: self.thresholds.max_objects]
            votes = self.voter.vote(image, [segments[index] for index in asked], name)
            for index, vote in zip(asked, votes, strict=True):
                shares = {color: round(share, 4) for color, share in vote.shares.items()}
                rows[index] |= {"color": vote.color, "color_votes": shares}
        return rows


def _plain(found: Mapping[str, Any]) -> Detection:
    """Convert numpy numbers to Python floats, which JSON can encode."""
    return {**found, "box": [float(side) for side in found["box"]], "score": float(found["score"])}
