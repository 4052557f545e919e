"""Yes-or-no questions about the shapes data set: balanced, true, repeatable, and rightly sorted into POPE's kinds."""

from collections import Counter

import pytest

from unimm.data.shapes import Scene, SceneObject
from unimm.errors import UserError
from unimm.evaluation.shapes.questions import pope_kind, rows, sample_pairs


def test_both_schemas_hold_the_same_questions() -> None:
    mme, pope = rows(40, seed=3)
    assert [(row["question"], row["answer"].lower()) for row in mme] == [
        (row["question"], row["answer"]) for row in pope
    ]
    assert set(mme[0]) == {"question_id", "image", "question", "answer", "category"}
    assert set(pope[0]) == {"id", "question_id", "question", "answer", "image_source", "image", "category"}
    assert set(Counter(row["question_id"] for row in mme).values()) == {2}
    assert Counter((row["category"], row["answer"]) for row in pope)["adversarial", "yes"] > 0
    for kind in ("adversarial", "random"):
        answers = Counter(row["answer"] for row in pope if row["category"] == kind)
        assert answers["yes"] == answers["no"] > 0


def test_answers_are_true_of_the_scene() -> None:
    for scene, yes, no in sample_pairs(20, seed=1):
        there = {(obj.color, obj.shape) for obj in scene.objects}
        for turn, expected in ((yes, True), (no, False)):
            words = turn.question.rstrip("?").split()
            fits = [pair for pair in there if set(pair) <= set(words) or words[-1] in pair and len(words) == 4]
            assert bool(fits) == expected, (turn, there)


def test_a_seed_gives_the_same_questions_and_another_seed_others() -> None:
    first, again, other = ([row["question"] for row in rows(12, seed)[1]] for seed in (0, 0, 1))
    assert first == again != other


def test_adversarial_joins_what_is_there_but_not_together() -> None:
    scene = Scene(
        objects=(SceneObject("circle", "red", 16, 16, 8), SceneObject("ring", "blue", 48, 48, 8)), background="white"
    )
    assert pope_kind(scene, "Is there a red ring?") == "adversarial"
    assert pope_kind(scene, "Is there a red cross?") == "random"
    assert pope_kind(scene, "Is there anything red?") == "random"


def test_an_odd_number_is_refused() -> None:
    with pytest.raises(UserError, match="7 questions cannot be asked 2 about a scene"):
        rows(7, seed=0)
