"""What must not change a verdict, and what must turn it round, on every recorded image."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unimm.evaluation.geneval.prompts import official_prompts
from unimm.evaluation.geneval.rules import verdict

MIRRORED = {"left of": "right of", "right of": "left of", "above": "above", "below": "below"}
Case = tuple[dict[str, Any], list[dict[str, Any]], int]


@pytest.fixture(scope="module")
def cases(unimm_data: Callable[[str], Path]) -> list[Case]:
    """(metadata, detections, width) of every recorded image."""
    prompts = official_prompts()
    lines = unimm_data("evaldata/fixtures/geneval_synthetic_cases.jsonl").read_text().splitlines()
    return [(prompts[case["meta_index"]], case["detections"], case["width"]) for case in map(json.loads, lines)]


def of(cases: list[Case], *tags: str) -> Iterator[Case]:
    found = [case for case in cases if case[0]["tag"] in tags]
    assert len({verdict(metadata, detections).correct for metadata, detections, _ in found}) == 2
    return iter(found)


def test_a_mirrored_image_shows_the_mirrored_relation(cases: list[Case]) -> None:
    for metadata, detections, width in of(cases, "position"):
        anchor, evaluated = metadata["include"]
        relation, target = evaluated["position"]
        turned = metadata | {"include": [anchor, evaluated | {"position": [MIRRORED[relation], target]}]}
        flipped = []
        for each in detections:
            x1, y1, x2, y2 = each["box"]
            flipped.append(each | {"box": [width - x2, y1, width - x1, y2]})
        assert verdict(turned, flipped).correct == verdict(metadata, detections).correct


def test_the_order_of_what_is_wanted_does_not_matter(cases: list[Case]) -> None:
    for metadata, detections, _ in of(cases, "two_object", "color_attr"):
        swapped = metadata | {"include": metadata["include"][::-1]}
        first, second = verdict(metadata, detections), verdict(swapped, detections)
        assert (first.correct, sorted(first.reasons)) == (second.correct, sorted(second.reasons))


def test_an_object_that_nobody_asked_for_changes_nothing(cases: list[Case]) -> None:
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    for metadata, detections, _ in of(cases, *tags):
        named = {rule["class"] for rule in metadata["include"]}
        label = "zebra" if "zebra" not in named else "toaster"
        stranger = {"label": label, "box": [0, 0, 9, 9], "score": 0.99, "color": "red"}
        first, second = verdict(metadata, detections), verdict(metadata, [stranger, *detections])
        assert (first.correct, first.reasons) == (second.correct, second.reasons)


def test_a_lower_counting_threshold_never_finds_fewer(cases: list[Case]) -> None:
    more = 0
    for metadata, detections, _ in of(cases, "counting"):
        counts = [verdict(metadata, detections, counting_threshold=limit).counts for limit in (0.9, 0.6, 0.3)]
        for strict, lenient in zip(counts, counts[1:], strict=False):
            assert all(lenient[name] >= count for name, count in strict.items())
            more += lenient != strict
    assert more > 0
