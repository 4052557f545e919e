"""Every rule of the scorer is held by a recorded verdict: change one line of its source, and a case turns over."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.evaluation.mutations import NOTHING, mutated
from unimm.data import relations
from unimm.evaluation.geneval import rules as geneval
from unimm.evaluation.geneval.prompts import official_prompts

Data = Callable[[str], Path]
MUTATIONS = {
    "counting threshold": ("counting_threshold: float = 0.9", "counting_threshold: float = 0.5"),
    "threshold": ("    threshold: float = 0.3\n", "    threshold: float = 0.4\n"),
    "sixteen of a class": ("max_objects: int = 16", "max_objects: int = 12"),
    "overlap is off": ("max_overlap: float = 1.0", "max_overlap: float = 0.5"),
    "dead zone": ("position_threshold: float = 0.1", "position_threshold: float = 0.2"),
    "dead zone of both extents": ("extent = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])", "extent = np.abs(a[1] - a[0])"),
    "counting threshold for counting only": ('if metadata["tag"] == "counting" else', 'if metadata["tag"] else'),
    "exclude from its count": ("if len(objects.get(name, [])) >= count:", "if len(objects.get(name, [])) > count:"),
    "failed groups are no target": ("groups.append(None if reason else found)", "groups.append(found)"),
    "sorted by confidence": ("scored.sort(key=lambda found: -found.score)", "pass"),
    "the most confident ones": ('[: wanted["count"]]', '[-wanted["count"] :]'),
    "enough of them": ("if len(found) < count:", "if len(found) < count - 1:"),
    "every object in the colour": ("if seen.count(color) < count:", "if False:"),
    "norm of the unrevised offset": ("np.linalg.norm(offset)", "np.linalg.norm(revised)"),
    "from the target to the object": ("a.mean(axis=0) - b.mean(axis=0)", "b.mean(axis=0) - a.mean(axis=0)"),
    "objects swapped": (
        "relative_position(item.box, anchor.box, position_threshold)",
        "relative_position(anchor.box, item.box, position_threshold)",
    ),
    "half of the offset": ('"left of": dx < -0.5', '"left of": dx < -0.7'),
    "left is not right": ('"right of": dx > 0.5', '"right of": dx < -0.5'),
    "y points down": ('"above": dy < -0.5, "below": dy > 0.5', '"above": dy > 0.5, "below": dy < -0.5'),
    "no relation in the dead zone": ("np.float32(threshold) * extent, 0)", "np.float32(threshold) * extent, 1)"),
}


@pytest.fixture(scope="module")
def recorded(unimm_data: Data) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The recorded images, each with its prompt, and the recorded pairs of boxes."""

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in unimm_data(f"evaldata/fixtures/{name}").read_text().splitlines()]

    prompts = official_prompts()
    cases = [case | {"prompt": prompts[case["meta_index"]]} for case in lines("geneval_synthetic_cases.jsonl")]
    return cases, lines("geneval_relative_position.jsonl")


def first_difference(rules: ModuleType, cases: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> str | None:
    """What the rules judge otherwise than recorded; None where they agree with everything."""
    for pair in pairs:
        if sorted(rules.relative_position(pair["a"], pair["b"])) != pair["relations"]:
            return f"boxes {pair}"
    for case in cases:
        scored = rules.verdict(case["prompt"], case["detections"])
        found = (scored.correct, sorted(scored.reasons), scored.counts)
        if found != (case["expected_correct"], sorted(case["expected_reason"]), case["expected_counts"]):
            return f"image {case['meta_index']}"
    return None


def test_the_rules_as_they_are(recorded: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    assert first_difference(mutated(geneval, *NOTHING), *recorded) is None


def changed(before: str, after: str) -> ModuleType:
    """The rules with one line changed, in their own module or in that of the relations that they use."""
    if before not in Path(relations.__file__).read_text(encoding="utf-8"):
        return mutated(geneval, before, after)
    rules = mutated(geneval, *NOTHING)
    rules.relative_position = mutated(relations, before, after).relative_position  # type: ignore[attr-defined]
    return rules


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_rule_is_found(name: str, recorded: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    assert first_difference(changed(*MUTATIONS[name]), *recorded) is not None
