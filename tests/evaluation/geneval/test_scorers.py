"""Scorers refuse to score when a known image comes out wrong, and name colors only where they are asked for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimm.errors import UserError
from unimm.evaluation.geneval import scorers as geneval_scorers
from unimm.evaluation.geneval.color_votes import Vote
from unimm.evaluation.geneval.detector import Segment
from unimm.evaluation.geneval.prompts import official_prompts
from unimm.evaluation.geneval.rules import COCO_CLASSES, Thresholds
from unimm.evaluation.geneval.scorers import DetectorScorer, SanityImage, ShapesScorer

DOG, CAT, PERSON, CUP = (COCO_CLASSES.index(name) for name in ("dog", "cat", "person", "cup"))
RED_DOG = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}
IMAGE = Image.new("RGB", (20, 10))


class ScriptedDetector:
    """Says of every image what it was told, by the image's size."""

    min_score, fingerprint = 0.05, "detector's"

    def __init__(self, found: dict[tuple[int, int], list[tuple[int, float]]]) -> None:
        self.found = found

    def detect(self, images: Sequence[Image.Image]) -> list[list[Segment]]:
        return [
            [
                Segment(label, (0.0, 0.0, 5.0, 5.0), score, np.ones((image.height, image.width), bool))
                for label, score in sorted(self.found.get(image.size, []), key=lambda pair: -pair[1])
            ]
            for image in images
        ]

    def describe(self) -> dict[str, Any]:
        return {"name": "scripted"}


class ScriptedVoter:
    """Names the colors in a given order, or that of a plain image; remembers how many it was asked for."""

    background, crop, name, fingerprint = "#999", True, "scripted", "voter's"

    def __init__(self, colors: Sequence[str] = ()) -> None:
        self.colors, self.asked = list(colors), list[tuple[str, int]]()

    def vote(self, image: Image.Image, segments: Sequence[Segment], class_name: str) -> list[Vote]:
        self.asked.append((class_name, len(segments)))
        if not self.colors:
            channel = int(np.argmax(image.getpixel((0, 0))))
            return [Vote(("red", "green", "blue")[channel], {}) for _ in segments]
        return [Vote(self.colors[index], {self.colors[index]: 0.900001}) for index in range(len(segments))]

    def describe(self) -> dict[str, Any]:
        return {"name": "scripted"}


def scorer(
    found: list[tuple[int, float]], colors: Sequence[str] = ("red",) * 20, **thresholds: float
) -> tuple[DetectorScorer, ScriptedVoter]:
    voter = ScriptedVoter(colors)
    return DetectorScorer(ScriptedDetector({IMAGE.size: found}), voter, Thresholds(**thresholds)), voter  # type: ignore[arg-type]


# ---- the shapes data set ---------------------------------------------------------------------------------------------


def test_the_shapes_scorer_knows_its_own_images() -> None:
    tested = ShapesScorer()
    known = tested.sanity_images()
    assert tested.check(known) == 13
    assert {each.metadata["tag"] for each in known} == set(geneval_scorers.TAGS)
    assert sum(each.expected for each in known) == 6


def test_a_scorer_that_sees_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = ShapesScorer()
    monkeypatch.setattr(geneval_scorers, "detect", lambda image: [])
    with pytest.raises(UserError, match="shapes fails on an image that is known: of a scene of .* found 0"):
        tested.check(tested.sanity_images())


def test_a_scorer_that_sees_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = ShapesScorer()
    first = tested.sanity_images()[0]
    seen = geneval_scorers.detect(first.image)
    monkeypatch.setattr(geneval_scorers, "detect", lambda image: seen)
    with pytest.raises(UserError, match="of an empty image it says of .*: right"):
        tested.check(tested.sanity_images()[:2])


def test_scores_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = ShapesScorer()
    seen = [replace(each, score=float("nan")) for each in geneval_scorers.detect(tested.sanity_images()[0].image)]
    monkeypatch.setattr(geneval_scorers, "detect", lambda image: seen)
    with pytest.raises(UserError, match="gives scores that are not finite for a scene of"):
        tested.check(tested.sanity_images())


# ---- geneval-hf ----------------------------------------------------------------------------------------------------


def test_colours_are_asked_for_where_the_prompt_names_one() -> None:
    tested, voter = scorer([(DOG, 0.9), (CAT, 0.8), (DOG, 0.31), (DOG, 0.3), (DOG, 0.1)], colors=("red", "blue"))
    (found,) = tested.detections([IMAGE], [RED_DOG])
    assert voter.asked == [("dog", 2)]  # 0.3 does not exceed the threshold
    assert [each.get("color") for each in found] == ["red", None, "blue", None, None]
    assert [each.get("color_votes") for each in found] == [{"red": 0.9}, None, {"blue": 0.9}, None, None]
    for each in found[:3]:
        (outline,) = each["outline"]
        assert (min(outline), max(outline[::2]), max(outline[1::2])) == (0, 20, 10)
    assert not any("outline" in each for each in found[3:])  # what does not count is not drawn
    assert tested.verdict(RED_DOG, found).correct
    tested, voter = scorer([(DOG, 0.9), (CAT, 0.8)])
    (found,) = tested.detections([IMAGE], [official_prompts()[0]])
    assert voter.asked == []
    assert [each["label"] for each in found] == ["dog", "cat"]


def test_at_most_as_many_colours_as_objects_count() -> None:
    tested, voter = scorer([(DOG, 0.9)] * 20, max_objects=5)
    (found,) = tested.detections([IMAGE], [RED_DOG])
    assert voter.asked == [("dog", 5)]
    assert tested.verdict(RED_DOG, found).counts == {"dog": 5}


def test_thresholds_are_options_and_stand_beside_the_number() -> None:
    tested, _ = scorer([(DOG, 0.4)], threshold=0.5)
    assert not tested.verdict(RED_DOG, tested.detections([IMAGE], [RED_DOG])[0]).correct
    described = tested.describe()
    assert (described["name"], described["thresholds"]["threshold"]) == ("geneval-hf", 0.5)
    assert tested.weights() == {"detector": "detector's", "clip": "voter's"}
    with pytest.raises(UserError, match="thresholds are at least 0"):
        Thresholds(threshold=-0.1)
    with pytest.raises(UserError, match="max_objects is at least 1"):
        Thresholds(max_objects=0)
    with pytest.raises(ValueError, match="drops scores below 0.05, the rules ask from 0.01"):
        scorer([], threshold=0.01)


def photographs(**found: int) -> DetectorScorer:
    """A detector that finds one object in each photograph of scikit-image."""
    from skimage import data

    sizes = {name: getattr(data, name)().shape for name in ("chelsea", "astronaut", "coffee")}
    script = {(shape[1], shape[0]): [(found[name], 0.95)] for name, shape in sizes.items()}
    return DetectorScorer(ScriptedDetector(script), ScriptedVoter())  # type: ignore[arg-type]


def test_known_photographs() -> None:
    tested = photographs(chelsea=CAT, astronaut=PERSON, coffee=CUP)
    assert tested.check(tested.sanity_images()) == 6
    tested = photographs(chelsea=DOG, astronaut=PERSON, coffee=CUP)
    with pytest.raises(UserError, match="geneval-hf fails on .* photograph of a cat .* expected cat>=1, found 0"):
        tested.check(tested.sanity_images())
    zebra = COCO_CLASSES.index("zebra")
    tested = photographs(chelsea=zebra, astronaut=zebra, coffee=zebra)
    with pytest.raises(UserError, match="geneval-hf fails on an image that is known"):
        tested.check(tested.sanity_images()[1:])


def test_plain_colours() -> None:
    tested = DetectorScorer(ScriptedDetector({}), ScriptedVoter(("red",)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="scripted calls an image of plain green red: no color is named with it"):
        tested.sanity_images()


def test_no_known_image_is_no_licence() -> None:
    with pytest.raises(UserError, match="has no known image to score first: give --sanity-images"):
        scorer([])[0].check([])
    tested, _ = scorer([(DOG, 0.9)])
    assert tested.check([SanityImage("mine", IMAGE, RED_DOG, True)]) == 1


@pytest.mark.parametrize(("share", "plain"), [(0.9, True), (0.51, True), (0.5, False), (0.2, False)])
def test_a_color_without_a_majority_is_a_guess(share: float, plain: bool) -> None:
    """The official verdict takes the best of ten colors, however close they are; the plain one does not."""
    tested, _ = scorer([(DOG, 0.9), (DOG, 0.8)])
    (found,) = tested.detections([IMAGE], [RED_DOG])
    for each in found:
        each["color_votes"] = {"red": share, "brown": 1 - share}
    assert tested.verdict(RED_DOG, found).correct
    assert tested.plain(RED_DOG, found) == (plain, 0 if plain else 1)  # one dog is asked for, and one is looked at
    single = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    assert tested.plain(single, found) == (True, 0)  # no color is asked for


def test_a_color_that_is_measured_is_no_guess() -> None:
    tested = ShapesScorer()
    for known in tested.sanity_images():
        (found,) = tested.detections([known.image], [known.metadata])
        assert tested.plain(known.metadata, found) == (known.expected, 0)
