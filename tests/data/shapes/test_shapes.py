"""The shapes data set: images, prompts and conversations agree with the scene they come from."""

import numpy as np
import pytest

from unimm.data.shapes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    TAGS,
    WITHHELD,
    Scene,
    SceneObject,
    render,
    render_array,
    sample_captioned_scene,
    sample_conversation,
    sample_prompt,
    sample_questions,
    sample_scene,
)
from unimm.data.shapes.datasets import ShapesImages
from unimm.data.shapes.prompts import scene_for, split_of
from unimm.data.shapes.world import DISTANCES, MAX_RADIUS, MIN_BORDER, MIN_GAP, MIN_RADIUS
from unimm.english import NUMBERS, plural, with_article
from unimm.errors import UserError
from unimm.evaluation.geneval.rules import relative_position, verdict


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_world_is_as_large_as_promised():
    assert len(SHAPES) >= 6 and len(COLORS) >= 8 and len(BACKGROUNDS) >= 4
    assert MAX_RADIUS / MIN_RADIUS >= 1.5
    assert {c for c, _ in WITHHELD} <= set(COLORS) and {s for _, s in WITHHELD} <= set(SHAPES)


# The share of its box that each shape fills, in closed form.
@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ("circle", np.pi / 4),
        ("square", 1.0),
        ("triangle", 0.5),
        ("diamond", 0.5),
        ("cross", 5 / 9),
        ("ring", np.pi * 3 / 16),
    ],
)
def test_areas_in_closed_form(shape, share):
    scene = Scene((SceneObject(shape, "red", 32.3, 31.6, 13.0),), "black")
    covered = (render_array(scene)[..., 0].astype(float) - 16) / (COLORS["red"][0] - 16)
    assert covered.sum() == pytest.approx(share * 26**2, rel=0.02)
    assert np.abs(DISTANCES[shape](np.array(0.0), np.array(0.0), 13.0)) > 0


def test_edges_are_soft_and_positions_free():
    """Half a pixel to the right moves the centre of mass by half a pixel: nothing snaps to a grid."""

    def centre(x: float) -> float:
        image = render_array(Scene((SceneObject("circle", "red", x, 32, 10),), "black"))[..., 0].astype(float) - 16
        return float((image.sum(0) * (np.arange(64) + 0.5)).sum() / image.sum())

    assert centre(30.5) - centre(30.0) == pytest.approx(0.5, abs=0.02)


def test_objects_keep_their_distance(rng):
    sizes = set()
    for _ in range(300):
        scene = sample_scene(rng, allow_withheld=True)
        sizes.add(len(scene.objects))
        for i, a in enumerate(scene.objects):
            assert MIN_RADIUS <= a.radius <= MAX_RADIUS
            assert min(a.box) >= MIN_BORDER - 1e-9 and max(a.box) <= 64 - MIN_BORDER + 1e-9
            for b in scene.objects[:i]:
                gap = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
                assert gap >= MIN_GAP - 1e-9
    assert sizes == {1, 2, 3, 4}


def test_scenes_repeat_by_seed_and_differ_by_number():
    stream = ShapesImages(10, seed=3)
    assert np.array_equal(stream[4]["image"], ShapesImages(10, seed=3)[4]["image"])
    assert not np.array_equal(stream[4]["image"], stream[5]["image"])
    assert render(sample_scene(np.random.default_rng(1))).size == (64, 64)


def test_a_scene_of_five_is_refused(rng):
    with pytest.raises(UserError, match="1 to 4 objects, not 5"):
        sample_scene(rng, num_objects=5)


def detections(scene: Scene) -> list[dict]:
    return [{"label": o.shape, "box": o.box, "score": 0.99, "color": o.color} for o in scene.objects]


@pytest.mark.parametrize("tag", TAGS)
def test_a_scene_for_a_prompt_satisfies_genevals_verdict(rng, tag):
    for _ in range(40):
        prompt = sample_prompt(rng, tag)
        scene = scene_for(rng, prompt)
        correct, reasons, _ = verdict(prompt.metadata(), detections(scene), class_names=SHAPES)
        assert correct, (prompt, reasons)
        assert prompt.background in (None, scene.background)
        assert len(scene.objects) == sum(rule["count"] for rule in prompt.include)


def test_training_never_names_or_shows_a_withheld_pair(rng):
    for _ in range(600):
        scene, prompt = sample_captioned_scene(rng)
        assert not prompt.names_withheld and split_of(prompt.prompt) == "train"
        assert not {(o.color, o.shape) for o in scene.objects} & WITHHELD
    for _ in range(200):
        scene, turns = sample_conversation(rng)
        assert not {(o.color, o.shape) for o in scene.objects} & WITHHELD
        assert not any(f"{c} {s}" in turn.question + turn.answer for turn in turns for c, s in WITHHELD)


def test_splits_share_no_prompt(rng):
    train = {sample_prompt(rng, tag, split="train").prompt for tag in TAGS for _ in range(200)}
    test = {sample_prompt(rng, tag, split="test").prompt for tag in TAGS for _ in range(200)}
    assert not train & test


@pytest.mark.parametrize("tag", TAGS)
def test_each_tag_has_fifty_held_out_prompts(rng, tag):
    assert len({sample_prompt(rng, tag, split="test").prompt for _ in range(800)}) >= 50


def test_withheld_prompts_are_for_evaluation(rng):
    assert all(sample_prompt(rng, split="test", withheld=True).names_withheld for _ in range(50))
    with pytest.raises(UserError, match="split='test'"):
        sample_prompt(rng, withheld=True)
    with pytest.raises(UserError, match="single_object"):
        sample_prompt(rng, "count")


def test_answers_follow_from_the_scene(rng):
    """Each kind recomputed from the scene by other means than the generator's."""
    for _ in range(150):
        scene, turn = sample_questions(rng, "existence")
        there = {with_article(o.shape) for o in scene.objects} | {
            with_article(f"{o.color} {o.shape}") for o in scene.objects
        }
        there |= {f"anything {o.color}" for o in scene.objects}
        assert (turn.question.removeprefix("Is there ").removesuffix("?") in there) == (turn.answer == "yes")
        scene, turn = sample_questions(rng, "color")
        assert [o.color for o in scene.objects if f"the {o.shape}?" in turn.question] == [turn.answer]
        scene, turn = sample_questions(rng, "count")
        words = turn.question.split()
        matching = [o for o in scene.objects if words[2] in (plural(o.shape), o.color, "objects")]
        assert NUMBERS[len(matching)] == turn.answer
        scene, turn = sample_questions(rng, "position")
        a, b = (
            next(o for o in scene.objects if f"{o.color} {o.shape}" == name)
            for name in turn.question.removeprefix("Where is the ").removesuffix("?").split(" relative to the ")
        )
        assert relative_position(a.box, b.box) == {turn.answer}
        scene, turn = sample_questions(rng, "place")
        (obj,) = (o for o in scene.objects if turn.question == f"Where is the {o.color} {o.shape}?")
        vertical = "top" if obj.y < 64 / 3 else "bottom" if obj.y >= 128 / 3 else ""
        horizontal = "left" if obj.x < 64 / 3 else "right" if obj.x >= 128 / 3 else ""
        assert turn.answer == (f"{vertical} {horizontal}".strip() or "center")


def test_yes_and_no_are_balanced(rng):
    answers = [sample_questions(rng, "existence")[1].answer for _ in range(600)]
    assert 0.42 < answers.count("yes") / 600 < 0.58


def test_conversations_ask_each_question_once(rng):
    for _ in range(50):
        _, turns = sample_conversation(rng, num_turns=6)
        assert 3 <= len(turns) <= 6 and len({t.question for t in turns}) == len(turns)
    with pytest.raises(UserError, match="existence, color, count"):
        sample_questions(rng, "size")


def test_conversations_ask_the_kinds_that_are_wanted() -> None:
    rng = np.random.default_rng(0)
    asked = [sample_conversation(rng, num_turns=2, kind_shares={"color": 1, "count": 3})[1] for _ in range(60)]
    kinds = [turn.kind for turns in asked for turn in turns]
    assert set(kinds) == {"color", "count"} and kinds.count("count") > kinds.count("color")
    with pytest.raises(UserError, match="no question kind 'taste'"):
        sample_conversation(rng, kind_shares={"taste": 1})
    with pytest.raises(UserError, match="one of them above 0"):
        sample_conversation(rng, kind_shares={"color": 0})
