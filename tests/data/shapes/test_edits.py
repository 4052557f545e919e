"""Edits: the instruction is true of the two scenes and of their renders, and nothing else is touched."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from unimm.data.relations import relative_position
from unimm.data.shapes import WITHHELD, render, render_array
from unimm.data.shapes.detector import background_of, detect
from unimm.data.shapes.edits import CELLS, KINDS, Edit, sample_edit
from unimm.data.shapes.strict import read_strictly
from unimm.data.shapes.world import MIN_BORDER, MIN_GAP
from unimm.errors import UserError


def some(kind: str, count: int = 150) -> list[Edit]:
    rng = np.random.default_rng([7, *kind.encode()])
    return [sample_edit(rng, kind) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_what_it_names_and_nothing_else(kind: str) -> None:
    for edit in some(kind):
        before, after = set(edit.source.objects), set(edit.target.objects)
        assert (edit.source.background != edit.target.background) == (kind == "background")
        removed, added = before - after, after - before
        assert set(edit.kept) == before & after
        expected = {"background": (0, 0), "color": (1, 1), "position": (1, 1), "nothing": (0, 0)}.get(kind)
        assert expected in (None, (len(removed), len(added)))
        assert bool(removed) != bool(added) or kind != "count"
        for old, new in zip(removed, added, strict=False):
            assert (old.shape, old.radius) == (new.shape, new.radius)
            assert ((old.x, old.y) == (new.x, new.y)) == (kind == "color") == (old.color != new.color)
        assert edit.holds(edit.target.objects, edit.target.background)
        assert edit.holds(edit.source.objects, edit.source.background) == (kind == "nothing")
        assert all(edit.unchanged(edit.target.objects))
        assert not {(each.color, each.shape) for each in (*before, *after)} & WITHHELD


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_after_an_edit_are_scenes(kind: str) -> None:
    for edit in some(kind):
        objects = edit.target.objects
        assert 1 <= len(objects) <= 4
        for number, a in enumerate(objects):
            assert min(a.box) >= MIN_BORDER - 1e-9 and max(a.box) <= 64 - MIN_BORDER + 1e-9
            for b in objects[:number]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + MIN_GAP - 1e-9


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_both_detectors_see_the_edit_in_the_renders(kind: str) -> None:
    edits = some(kind, 60)
    for see in (detect, lambda image: read_strictly(image).objects):
        images = [(render(edit.source), render(edit.target)) for edit in edits]
        right = [edit.holds(see(after), background_of(after)) for edit, (_, after) in zip(edits, images, strict=True)]
        wrong = [
            edit.holds(see(before), background_of(before)) for edit, (before, _) in zip(edits, images, strict=True)
        ]
        kept = [all(edit.unchanged(see(after))) for edit, (_, after) in zip(edits, images, strict=True)]
        assert np.mean(right) >= 0.95 and np.mean(kept) >= 0.98
        assert np.mean(wrong) <= 0.05 or kind == "nothing"  # whose source is right
    assert all(background_of(render_array(edit.target)) == edit.target.background for edit in edits)


def test_what_an_instruction_says_is_what_is_checked() -> None:
    """Read the instructions back with string operations, apart from the code that wrote them."""
    for edit in some("position", 300):
        text = edit.instruction.lower()
        moved = edit.changed
        assert moved is not None and edit.place is not None
        if edit.anchor is None:
            assert f"to the {edit.place}" in text
            x, y = moved.x / 64 * 3, moved.y / 64 * 3
            for word, holds in (("left", x < 1), ("right", x >= 2), ("top", y < 1), ("bottom", y >= 2)):
                assert holds or word not in edit.place.split()
        else:
            assert edit.place in text
            assert relative_position(moved.box, edit.anchor.box) == {edit.place}
    for edit in some("count", 300):
        assert edit.count is not None
        color, shape, number = edit.count
        found = Counter(each.shape for each in edit.target.objects if color in (None, each.color))
        assert found[shape] == number
        verbs = ("add", "put", "draw") if edit.changed else ("remove", "delete", "take")
        assert any(verb in edit.instruction.lower() for verb in verbs)
    for edit in some("color", 100):
        assert edit.changed is not None
        words = {"purple": ("purple", "violet")}.get(edit.changed.color, (edit.changed.color,))
        assert any(word in edit.instruction.lower() for word in words)


def test_a_copy_is_no_move_and_a_moved_neighbor_is_noticed() -> None:
    edit = next(each for each in some("position") if each.kept and each.anchor is None)
    assert edit.changed is not None
    old = next(each for each in edit.source.objects if each not in edit.kept)
    assert not edit.holds([*edit.target.objects, old], edit.target.background)
    shifted = [replace(each, x=each.x + 4) if each is edit.kept[0] else each for each in edit.target.objects]
    assert edit.unchanged(shifted)[0] is False
    grown = [replace(each, radius=each.radius + 3) if each is edit.kept[0] else each for each in edit.target.objects]
    assert edit.unchanged(grown)[0] is False


def test_a_copy_with_one_object_too_many_or_another_background_is_wrong() -> None:
    edit = next(each for each in some("nothing") if len(each.kept) == 2)
    first, second = edit.kept
    assert not edit.holds([first], edit.source.background)
    assert not edit.holds([first, second, replace(second, x=second.x + 20)], edit.source.background)
    assert not edit.holds([first, second], "none of them")


def test_kinds_by_given_shares() -> None:
    rng = np.random.default_rng(0)
    assert {sample_edit(rng, kind_shares={"nothing": 2.0}).kind for _ in range(20)} == {"nothing"}
    with pytest.raises(UserError, match="There is no edit kind 'size'; the kinds are color, count"):
        sample_edit(rng, kind_shares={"size": 1.0})


def test_all_places_and_kinds_occur() -> None:
    rng = np.random.default_rng(0)
    edits = [sample_edit(rng) for _ in range(600)]
    shares = Counter(edit.kind for edit in edits)
    assert all(shares[kind] >= 25 for kind in KINDS)
    assert {edit.place for edit in edits if edit.place} >= set(CELLS)
