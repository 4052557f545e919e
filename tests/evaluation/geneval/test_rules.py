"""GenEval's rules against the recorded verdicts of the official functions, and one pinned case per rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimm.evaluation.geneval.rules import COCO_CLASSES, TAGS, box_iou, relative_position, summary, verdict

Data = Callable[[str], Path]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seen(label: int | str, score: float = 0.95, box: tuple[float, ...] = (0, 0, 10, 10), color: str = "red") -> dict:
    return {"label": label, "score": score, "box": box, "color": color}


def wanted(*include: dict, tag: str = "two_object", exclude: tuple[dict, ...] = ()) -> dict:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "a photo"}


DOG = {"class": "dog", "count": 1}
THREE_DOGS = wanted({"class": "dog", "count": 3}, tag="counting", exclude=({"class": "dog", "count": 4},))


# ---- recorded ----------------------------------------------------------------------------------------------------


def test_recorded_verdicts(unimm_data: Data) -> None:
    prompts = lines(unimm_data("evaldata/geneval/evaluation_metadata.jsonl"))
    cases = lines(unimm_data("evaldata/fixtures/geneval_synthetic_cases.jsonl"))
    assert len(cases) == 553
    for case in cases:
        correct, reasons, counts = verdict(prompts[case["meta_index"]], case["detections"])
        assert correct == case["expected_correct"], case["meta_index"]
        assert sorted(reasons) == sorted(case["expected_reason"])
        assert counts == case["expected_counts"]


def test_recorded_relations(unimm_data: Data) -> None:
    cases = lines(unimm_data("evaldata/fixtures/geneval_relative_position.jsonl"))
    assert len(cases) == 31
    for case in cases:
        assert sorted(relative_position(case["a"], case["b"])) == case["relations"], case


def test_class_names_are_the_official_list(unimm_data: Data) -> None:
    names = unimm_data("evaldata/geneval/object_names.txt").read_text(encoding="utf-8").split("\n")
    assert [name for name in names if name] == list(COCO_CLASSES)


# ---- relations: equal squares of 100 pixels, the dead zone is 20 -------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "relations"),
    [
        ((0, 0), set()),
        ((40, 0), set()),  # (40 - 20) / 40 is exactly one half
        ((-40, 0), set()),
        ((0, 40), set()),
        ((0, -40), set()),
        ((41, 0), {"right of"}),
        ((-41, 0), {"left of"}),
        ((0, 41), {"below"}),
        ((0, -41), {"above"}),
        ((100, 100), {"right of", "below"}),
        ((-100, -100), {"left of", "above"}),
        ((50, 50), set()),
        ((100, 75), {"right of"}),  # divided by the norm of the revised offset it would be below, too
    ],
)
def test_relation_of_an_offset(offset: tuple[float, float], relations: set[str]) -> None:
    x, y = offset
    assert relative_position((x, y, x + 100, y + 100), (0, 0, 100, 100)) == relations


def test_the_dead_zone_is_an_option_and_scales_with_both_boxes() -> None:
    a, b = (60, 0, 160, 100), (0, 0, 100, 100)
    assert relative_position(a, b) == {"right of"}
    assert relative_position(a, b, threshold=0.2) == set()
    assert (
        relative_position((60, 0, 160, 100), (-200, 0, 300, 100)) == set()
    )  # the same centres, one box five times as wide


# ---- which detections count --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "counts"), [(0.29, {}), (np.float32(0.3), {}), (0.3, {}), (0.31, {"dog": 1})])
def test_threshold_is_exceeded_in_float32(score: float, counts: dict[str, int]) -> None:
    assert verdict(wanted(DOG), [seen(16, score)]).counts == counts


@pytest.mark.parametrize(("score", "found"), [(0.6, 0), (0.9, 0), (0.91, 3)])
def test_counting_has_its_own_threshold(score: float, found: int) -> None:
    scored = verdict(THREE_DOGS, [seen(16, score)] * 3)
    assert scored.counts.get("dog", 0) == found
    assert scored.correct == (found == 3)


def test_thresholds_are_options() -> None:
    assert verdict(wanted(DOG), [seen(16, 0.1)], threshold=0.05).correct
    assert not verdict(wanted(DOG), [seen(16, 0.6)], threshold=0.7).correct
    assert verdict(THREE_DOGS, [seen(16, 0.6)] * 3, counting_threshold=0.5).correct


def test_at_most_sixteen_of_a_class() -> None:
    assert verdict(wanted(DOG), [seen(16)] * 20).counts == {"dog": 16}
    assert verdict(wanted(DOG), [seen(16)] * 20, max_objects=12).counts == {"dog": 12}


def test_overlap_is_ignored_unless_asked() -> None:
    dogs = [seen(16, 0.95, (0, 0, 9, 9)), seen(16, 0.94, (0, 0, 9, 4))]  # 100 and 50 pixels, sides inclusive
    assert box_iou(dogs[0]["box"], dogs[1]["box"]) == 0.5
    assert verdict(wanted(DOG), dogs).counts == {"dog": 2}
    assert verdict(wanted(DOG), dogs, max_overlap=0.51).counts == {"dog": 2}
    assert verdict(wanted(DOG), dogs, max_overlap=0.5).counts == {"dog": 1}
    assert box_iou((0, 0, 9, 9), (5, 0, 9, 9)) == 0.5
    assert box_iou((0, 0, 9, 9), (20, 20, 29, 29)) == 0


def test_labels_are_indices_or_names() -> None:
    metadata = wanted({"class": "ring", "count": 1})
    for label in ("ring", 1):
        assert verdict(metadata, [seen(label)], class_names=("circle", "ring")).correct
    with pytest.raises(ValueError, match="label 2 is outside 0..1"):
        verdict(metadata, [seen(2)], class_names=("circle", "ring"))
    with pytest.raises(ValueError, match="'dog' is none of the 2 class names"):
        verdict(metadata, [seen("dog")], class_names=("circle", "ring"))


# ---- include and exclude -----------------------------------------------------------------------------------------


def test_too_few() -> None:
    scored = verdict(wanted({"class": "dog", "count": 2}), [seen(16)])
    assert scored == (False, ["expected dog>=2, found 1"], {"dog": 1})


def test_extra_objects_matter_only_where_excluded() -> None:
    assert verdict(wanted(DOG), [seen(16)] * 5).correct
    assert verdict(THREE_DOGS, [seen(16)] * 3).correct
    scored = verdict(THREE_DOGS, [seen(16)] * 4)  # 4 is as many as excluded
    assert (scored.correct, scored.reasons) == (False, ["expected dog<4, found 4"])
    assert verdict(THREE_DOGS, [*[seen(16)] * 3, seen(17), seen(16, 0.89)]).correct


def test_colour_is_judged_on_the_most_confident_object() -> None:
    metadata = wanted(DOG | {"color": "green"}, tag="colors")
    assert verdict(metadata, [seen(16, 0.5, color="red"), seen(16, 0.6, color="green")]).correct
    scored = verdict(metadata, [seen(16, 0.5, color="green"), seen(16, 0.6, color="red")])
    assert scored.reasons == ["expected green dog>=1, found 0 green; and 1 red"]


def test_every_counted_object_needs_the_colour() -> None:
    metadata = wanted({"class": "dog", "count": 3, "color": "green"}, tag="colors")
    mixed = [seen(16, color=color) for color in ("white", "green", "red")]
    assert verdict(metadata, mixed).reasons == [
        "expected green dog>=3, found 1 green; and 1 red and 1 green and 1 white"
    ]
    assert verdict(metadata, [seen(16, color="green")] * 3).correct


CAT_ABOVE_DOG = wanted(DOG, {"class": "cat", "count": 1, "position": ["above", 0]}, tag="position")
HIGH, LOW, RIGHT = (0, 0, 10, 10), (0, 50, 10, 60), (50, 0, 60, 10)


def test_position_is_that_of_the_later_object_to_the_earlier() -> None:
    assert verdict(CAT_ABOVE_DOG, [seen("dog", box=LOW), seen("cat", box=HIGH)]).correct
    scored = verdict(CAT_ABOVE_DOG, [seen("dog", box=HIGH), seen("cat", box=LOW)])
    assert scored.reasons == ["expected cat above target, found below target"]
    scored = verdict(CAT_ABOVE_DOG, [seen("dog", box=HIGH), seen("cat", box=HIGH)])
    assert scored.reasons == ["expected cat above target, found  target"]
    scored = verdict(CAT_ABOVE_DOG, [seen("dog", box=HIGH), seen("cat", box=(50, 50, 60, 60))])
    assert scored.reasons == ["expected cat above target, found below and right of target"]


def test_position_without_a_target() -> None:
    reasons = verdict(CAT_ABOVE_DOG, [seen("cat", box=HIGH)]).reasons
    assert reasons == ["expected dog>=1, found 0", "no target for cat to be above"]


def test_a_group_that_failed_is_no_target() -> None:
    metadata = wanted(DOG | {"color": "green"}, CAT_ABOVE_DOG["include"][1], tag="position")
    reasons = verdict(metadata, [seen("dog", box=LOW, color="red"), seen("cat", box=HIGH)]).reasons
    assert reasons == ["expected green dog>=1, found 0 green; and 1 red", "no target for cat to be above"]


def test_position_holds_between_every_two_objects() -> None:
    metadata = wanted({"class": "dog", "count": 2}, CAT_ABOVE_DOG["include"][1], tag="position")
    cat = seen("cat", box=HIGH)
    assert verdict(metadata, [cat, seen("dog", box=LOW), seen("dog", box=(0, 90, 10, 100))]).correct
    scored = verdict(metadata, [cat, seen("dog", box=LOW), seen("dog", box=RIGHT)])
    assert scored.reasons == ["expected cat above target, found left of target"]
    metadata = wanted(DOG, {"class": "cat", "count": 2, "position": ["above", 0]}, tag="position")
    scored = verdict(metadata, [cat, seen("dog", box=LOW), seen("cat", 0.9, box=(0, 90, 10, 100))])
    assert scored.reasons == ["expected cat above target, found below target"]


# ---- summary -----------------------------------------------------------------------------------------------------


def test_overall_is_the_unweighted_mean_of_the_tags() -> None:
    rows = [{"tag": tag, "prompt": "p", "correct": True} for tag in TAGS]
    rows += [{"tag": "counting", "prompt": prompt, "correct": False} for prompt in ("p", "p", "q")]
    scores = summary(rows)
    assert scores["counting"] == 0.25
    assert scores["overall"] == pytest.approx((5 + 0.25) / 6)
    assert scores["correct_images"] == pytest.approx(6 / 9)
    assert scores["correct_prompts"] == pytest.approx(6 / 7)


def test_summary_refuses_missing_and_unknown_tags() -> None:
    rows = [{"tag": tag, "prompt": "p", "correct": True} for tag in TAGS]
    with pytest.raises(ValueError, match="no image of color_attr"):
        summary(rows[:-1])
    with pytest.raises(ValueError, match="unknown tag 'scene'"):
        summary([*rows, {"tag": "scene", "prompt": "p", "correct": True}])
