"""GenEval's rules (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513): decide from detections if an image is correct.

Pure numpy: no detector, no color classifier, no files.

- Objects of a class are ordered by confidence and only the `count` most confident ones are checked, so extra objects
  are harmless unless the metadata excludes them (only the counting prompts do).
- Counting prompts use a confidence threshold of their own, 0.9 instead of 0.3.
- The direction of an offset is normalized by the offset *before* the dead zone is subtracted, so a diagonal neighbor
  may be in two relations, one, or none.

Scores and boxes are compared in float32, as detectors return them. x points right, y down; a box is (x1, y1, x2, y2)
in pixels.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from unimm.data.relations import Box, relative_position
from unimm.errors import UserError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GRAY = "#999"  # background around an object whose color is named
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The 80 COCO classes in COCO's order; the benchmark renames three (computer mouse, tv remote, computer keyboard).
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,"
    "tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
)
COCO_CLASSES = tuple(_COCO_NAMES.split(","))


class Verdict(NamedTuple):
    """The rules' result for one image: `reasons` lists what failed, `counts` the kept detections per class."""

    correct: bool
    reasons: list[str]
    counts: dict[str, int]


class FoundObject(NamedTuple):
    """A detection above the threshold: `box` is [4] in float32."""

    box: np.ndarray
    color: str | None
    score: np.float32


def box_iou(box_a: Box, box_b: Box) -> float:
    """Compute the IoU of two boxes in the inclusive-pixel convention (a side is x2 - x1 + 1 pixels)."""
    a, b = np.asarray(box_a, dtype=np.float32)[:4], np.asarray(box_b, dtype=np.float32)[:4]
    shared = _inclusive_area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    union = _inclusive_area(a) + _inclusive_area(b) - shared
    return shared / union if union > 0 else 0.0


@dataclass(frozen=True)
class Thresholds:
    """Options of the official scorer, by their official names; see `verdict`."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.max_objects < 1 or min(self.threshold, self.counting_threshold, self.position_threshold) < 0:
            raise UserError(f"{self} means nothing: thresholds are at least 0, and max_objects is at least 1.")

    def limit(self, metadata: Mapping[str, Any]) -> float:
        """Return the confidence threshold of a prompt's tag."""
        return self.counting_threshold if metadata["tag"] == "counting" else self.threshold


def verdict(
    metadata: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    *,
    class_names: Sequence[str] = COCO_CLASSES,
    threshold: float = Thresholds.threshold,
    counting_threshold: float = Thresholds.counting_threshold,
    max_objects: int = Thresholds.max_objects,
    max_overlap: float = Thresholds.max_overlap,
    position_threshold: float = Thresholds.position_threshold,
) -> Verdict:
    """Apply the rules of a prompt's metadata to the detections of one image.

    Args:
        metadata: one line of GenEval's metadata: `tag`, `include` (class, count, optional color and position) and
            optional `exclude` (class, count).
        detections: mappings with `label` (index into `class_names`, or the class name itself), `box` (xyxy), `score`
            and, if the prompt asks for a color, `color`.
        threshold, counting_threshold: confidence that a detection must exceed; the second is for the counting tag.
        max_objects: number of most confident detections kept per class.
        max_overlap: drop a detection whose IoU with a better one of its class is at least this; 1 disables it.
        position_threshold: dead zone of `relative_position`.

    Raises:
        ValueError: a label is neither an index into `class_names` nor one of them.
    """
    limit = Thresholds(threshold, counting_threshold).limit(metadata)
    objects = select_objects(detections, class_names, limit=limit, max_objects=max_objects, max_overlap=max_overlap)
    reasons: list[str] = []
    groups: list[list[FoundObject] | None] = []  # objects of each include entry, None if it failed
    for wanted in metadata["include"]:
        found = objects.get(wanted["class"], [])[: wanted["count"]]
        reason = _first_failure(wanted, found, groups, position_threshold)
        groups.append(None if reason else found)
        if reason:
            reasons.append(reason)
    for unwanted in metadata.get("exclude", ()):
        name, count = unwanted["class"], unwanted["count"]
        if len(objects.get(name, [])) >= count:
            reasons.append(f"expected {name}<{count}, found {len(objects[name])}")
    return Verdict(not reasons, reasons, {name: len(group) for name, group in objects.items()})


def failed_rule(reason: str) -> str | None:
    """Return the rule that a reason of `verdict` names: too few, too many, color or position; None for other text."""
    if reason.startswith("no target for ") or (reason.startswith("expected ") and " target, found" in reason):
        return "position"
    if not (reason.startswith("expected ") and ", found " in reason):
        return None
    if "; and " in reason:
        return "color"
    return "too few" if ">=" in reason else "too many"


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Compute GenEval's scores from many images, each a mapping with `tag`, `prompt` and `correct`.

    Returns:
        The mean per tag; `overall`, the unweighted mean of the six tags; `correct_images`, the mean over all images;
        and `correct_prompts`, the fraction of prompts with at least one correct image.

    Raises:
        ValueError: a tag is unknown, or one of the six has no image.
    """
    by_tag: dict[str, list[bool]] = {tag: [] for tag in TAGS}
    by_prompt: dict[tuple[str, str], bool] = defaultdict(bool)
    for row in rows:
        if row["tag"] not in by_tag:
            raise ValueError(f"unknown tag {row['tag']!r}: GenEval has {', '.join(TAGS)}")
        by_tag[row["tag"]].append(bool(row["correct"]))
        by_prompt[row["tag"], row["prompt"]] |= bool(row["correct"])
    if missing := [tag for tag, correct in by_tag.items() if not correct]:
        raise ValueError(f"no image of {', '.join(missing)}: overall is the mean of all {len(TAGS)} tags")
    scores = {tag: float(np.mean(correct)) for tag, correct in by_tag.items()}
    overall = float(np.mean(list(scores.values())))
    images = float(np.mean([verdict for correct in by_tag.values() for verdict in correct]))
    prompts = float(np.mean(list(by_prompt.values())))
    return scores | {"overall": overall, "correct_images": images, "correct_prompts": prompts}


def select_objects(
    detections: Iterable[Mapping[str, Any]],
    class_names: Sequence[str],
    *,
    limit: float,
    max_objects: int,
    max_overlap: float,
) -> dict[str, list[FoundObject]]:
    """Return the detections above the confidence `limit` per class, most confident first (ties keep their order)."""
    names = set(class_names)
    by_class: dict[str, list[FoundObject]] = defaultdict(list)
    for detection in detections:
        name, score = _class_name(detection["label"], class_names, names), np.float32(detection["score"])
        if score > np.float32(limit):
            box = np.asarray(detection["box"], dtype=np.float32)
            by_class[name].append(FoundObject(box, detection.get("color"), score))
    selected = {}
    for name, scored in by_class.items():
        scored.sort(key=lambda found: -found.score)
        kept: list[FoundObject] = []
        for candidate in scored[:max_objects]:
            if max_overlap == 1 or all(box_iou(candidate.box, other.box) < max_overlap for other in kept):
                kept.append(candidate)
        selected[name] = kept
    return selected


def _class_name(label: int | str, class_names: Sequence[str], names: set[str]) -> str:
    if isinstance(label, str):
        if label not in names:
            raise ValueError(f"label {label!r} is none of the {len(class_names)} class names")
        return label
    if not 0 <= label < len(class_names):
        raise ValueError(f"label {label} is outside 0..{len(class_names) - 1}, the range of the class names")
    return class_names[label]


def _first_failure(
    wanted: Mapping[str, Any],
    found: list[FoundObject],
    groups: list[list[FoundObject] | None],
    position_threshold: float,
) -> str | None:
    """Return why `found` does not satisfy one include entry, in GenEval's words; None if it does."""
    name, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if color := wanted.get("color"):
        seen = [item.color for item in found]
        if seen.count(color) < count:
            tally = " and ".join(f"{seen.count(c)} {c}" for c in COLORS if c in seen)
            return f"expected {color} {name}>={count}, found {seen.count(color)} {color}; and {tally}"
    if position := wanted.get("position"):
        relation, target = position
        anchors = groups[target]
        if anchors is None:
            return f"no target for {name} to be {relation}"
        for item in found:
            for anchor in anchors:
                relations = relative_position(item.box, anchor.box, position_threshold)
                if relation not in relations:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(relations))} target"
    return None


def _inclusive_area(box: np.ndarray) -> float:
    return float(max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0))
