"""Edits of scenes of the shapes data set: an instruction, the scene before it and the scene after it.

Only what the instruction names changes: all other objects keep place, size, color and shape, and the background stays.
`holds` says whether a set of objects fulfils an instruction, for scenes and for detections alike.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from unimm.data.relations import RELATIONS, relative_position
from unimm.data.shapes.conversations import cell_of, normalized_shares, sample_talking_scene
from unimm.data.shapes.phrasings import in_other_words, typed
from unimm.data.shapes.world import (
    BACKGROUNDS,
    COLORS,
    LARGEST_RADIUS,
    MIN_BORDER,
    MIN_GAP,
    MIN_RADIUS,
    SHAPES,
    WITHHELD,
    Scene,
    SceneObject,
    allowed_pairs,
)
from unimm.english import plural, with_article

MAX_OBJECTS = max(LARGEST_RADIUS)
NEAR = 3.0  # pixels within which the center of an object that stays may be found again
SAME_SIZE = 2.0  # pixels by which its radius may differ
SPOTS = 40  # tries to find a free place
SIDES = {"left": (None, 0), "right": (None, 2), "top": (0, None), "bottom": (2, None)}  # row and column of PLACES
CORNERS = {
    f"{row} {column}": (2 * (row == "bottom"), 2 * (column == "right"))
    for row in ("top", "bottom")
    for column in ("left", "right")
}
CELLS: dict[str, tuple[int | None, int | None]] = {**SIDES, **CORNERS}

FORMS: dict[str, tuple[str, ...]] = {
    "color": (
        *("Make {it} {color}.", "Turn {it} {color}.", "Paint {it} {color}.", "Change the color of {it} to {color}."),
        "{it} should be {color}.",
    ),
    "add": ("Add {thing}.", "Draw {thing} too.", "Put {thing} into the picture."),
    "second": ("Add a second {shape}.", "Add another {shape}.", "Draw another {shape}."),
    "remove": ("Remove {it}.", "Delete {it}.", "Take {it} away."),
    "remove_all": ("Remove all {shapes}.", "Delete all {shapes}."),
    "cell": ("Move {it} to the {cell}.", "Put {it} to the {cell}."),
    "relation": ("Move {it} {relation} the {anchor}.", "Put {it} {relation} the {anchor}."),
    "background": (
        *("Make the background {tone}.", "Change the background to {tone}.", "Paint the background {tone}."),
        "Put it on a {tone} background.",
    ),
    "nothing": ("Change nothing.", "Leave everything as it is.", "Draw the same picture again.", "Copy this picture."),
}
KIND_SHARES = {"color": 0.25, "count": 0.26, "position": 0.31, "background": 0.11, "nothing": 0.07}
KINDS = tuple(KIND_SHARES)


class Located(Protocol):
    """An object in an image: a `SceneObject`, or a detection of either detector."""

    @property
    def shape(self) -> str: ...

    @property
    def color(self) -> str: ...

    @property
    def box(self) -> tuple[float, float, float, float]: ...


@dataclass(frozen=True)
class Edit:
    """An instruction and the two scenes.

    Args:
        kind: of KINDS.
        kept: the objects that the instruction does not name; they are the same in both scenes.
        changed: the object that is recolored, added or moved, as it is afterwards; None if objects were removed, the
            background was changed, or nothing.
        place: where a moved object must be: a key of CELLS or a relation to `anchor`.
        count: how many objects of a shape, and color if it is named, there must be afterwards.
    """

    kind: str
    instruction: str
    source: Scene
    target: Scene
    kept: tuple[SceneObject, ...]
    changed: SceneObject | None = None
    place: str | None = None
    anchor: SceneObject | None = None
    count: tuple[str | None, str, int] | None = None

    def holds(self, found: Sequence[Located], background: str) -> bool:
        """Return whether an image with these objects on this background fulfils the instruction."""
        if self.kind == "background":
            return background == self.target.background
        if self.kind == "nothing":
            return len(found) == len(self.kept) and all(self.unchanged(found)) and background == self.source.background
        if self.count is not None:
            color, shape, number = self.count
            return sum(each.shape == shape and color in (None, each.color) for each in found) == number
        assert self.changed is not None
        alike = [each for each in found if (each.color, each.shape) == (self.changed.color, self.changed.shape)]
        if self.kind == "color":
            return any(_near(each, self.changed) for each in alike)
        as_many = len(alike) == sum(  # moved, not copied
            (each.color, each.shape) == (self.changed.color, self.changed.shape) for each in self.target.objects
        )
        return as_many and any(self._is_placed(each, found) for each in alike)

    def unchanged(self, found: Sequence[Located]) -> list[bool]:
        """Return for each kept object whether it is found where it was, in its size."""
        return [
            any((each.color, each.shape) == (kept.color, kept.shape) and _near(each, kept) for each in found)
            for kept in self.kept
        ]

    def _is_placed(self, found: Located, all_found: Sequence[Located]) -> bool:
        if self.anchor is None:
            return _in_cell(found.box, str(self.place), self.target.image_size)
        anchors = [each for each in all_found if (each.color, each.shape) == (self.anchor.color, self.anchor.shape)]
        return any(each is not found and relative_position(found.box, each.box) == {self.place} for each in anchors)


def sample_edit(
    rng: np.random.Generator, kind: str | None = None, kind_shares: Mapping[str, float] | None = None
) -> Edit:
    """Sample a scene and an edit of `kind` (None: of a kind by `kind_shares`, by default KIND_SHARES); no pair is
    withheld, and the edit changes the scene unless its kind is "nothing".

    Raises:
        UserError: if the shares are invalid.
    """
    shares = normalized_shares(KIND_SHARES if kind_shares is None else kind_shares, KINDS, "edit")
    name = kind or str(rng.choice(KINDS, p=shares))
    while True:
        edit = _EDITS[name](rng, sample_talking_scene(rng))
        if edit is not None:
            return replace(edit, instruction=_styled(rng, edit.instruction))


def _styled(rng: np.random.Generator, text: str) -> str:
    """Vary an instruction: synonyms, British spelling, please, typed without capitals."""
    if rng.random() < 0.2:
        text = text.replace("color", "colour")
    text, style = in_other_words(rng, text[0].upper() + text[1:]), rng.random()
    if style < 0.15 and not text.startswith(("It ", "The ")):
        text = f"Please {text[0].lower()}{text[1:]}"
    return typed(text) if style > 0.8 else text


def _color(rng: np.random.Generator, scene: Scene) -> Edit | None:
    obj, name = _named(rng, scene)
    if obj is None:
        return None
    free = [color for color in COLORS if color != obj.color and (color, obj.shape) not in WITHHELD]
    changed = replace(obj, color=str(rng.choice(free)))
    text = _form(rng, "color", it=name, color=changed.color)
    return _edit("color", text, scene, obj, changed)


def _count(rng: np.random.Generator, scene: Scene) -> Edit | None:
    if len(scene.objects) == 1 or (len(scene.objects) < MAX_OBJECTS and rng.random() < 0.5):
        return _add(rng, scene)
    if rng.random() < 0.25:
        return _remove_all(rng, scene)
    obj, name = _named(rng, scene)
    if obj is None:
        return None
    by_shape = name == f"the {obj.shape}"
    left = sum(each.shape == obj.shape and (by_shape or each.color == obj.color) for each in scene.objects) - 1
    count = (None if by_shape else obj.color, obj.shape, left)
    return _edit("count", _form(rng, "remove", it=name), scene, obj, None, count=count)


def _add(rng: np.random.Generator, scene: Scene) -> Edit | None:
    lonely = [each for each in scene.objects if sum(each.shape == o.shape for o in scene.objects) == 1]
    second = bool(lonely) and rng.random() < 0.4
    if second:
        old = lonely[int(rng.integers(len(lonely)))]
        color, shape, wanted = old.color, old.shape, None
        text = _form(rng, "second", shape=shape)
    else:
        pairs = allowed_pairs(False)
        color, shape = pairs[int(rng.integers(len(pairs)))]
        wanted = color
        text = _form(rng, "add", thing=with_article(f"{color} {shape}"))
    radius = float(rng.uniform(MIN_RADIUS, LARGEST_RADIUS[len(scene.objects) + 1]))
    spot = _spot(rng, radius, scene.objects, scene.image_size, lambda box: True)
    if spot is None:
        return None
    there = sum(each.shape == shape and wanted in (None, each.color) for each in scene.objects)
    added = SceneObject(shape, color, *spot, radius)
    return _edit("count", text, scene, None, added, count=(wanted, shape, there + 1))


def _remove_all(rng: np.random.Generator, scene: Scene) -> Edit | None:
    shapes = [shape for shape in SHAPES if 1 < sum(each.shape == shape for each in scene.objects) < len(scene.objects)]
    if not shapes:
        return None
    shape = shapes[int(rng.integers(len(shapes)))]
    kept = tuple(each for each in scene.objects if each.shape != shape)
    text = _form(rng, "remove_all", shapes=plural(shape))
    return Edit("count", text, scene, replace(scene, objects=kept), kept, count=(None, shape, 0))


def _position(rng: np.random.Generator, scene: Scene) -> Edit | None:
    obj, name = _named(rng, scene)
    if obj is None:
        return None
    others = [each for each in scene.objects if each is not obj]
    anchor, anchor_name = _named(rng, scene) if others and rng.random() < 0.5 else (None, "")
    size = scene.image_size
    if anchor is not None and anchor is not obj:
        place = str(rng.choice(RELATIONS))
        written = f"to the {place}" if place in ("left of", "right of") else place
        text = _form(rng, "relation", it=name, relation=written, anchor=anchor_name.removeprefix("the "))
        beside = anchor.box
        spot = _spot(rng, obj.radius, others, size, lambda box: relative_position(box, beside) == {place})
        already = relative_position(obj.box, beside) == {place}
    else:
        place, anchor = str(rng.choice(list(CELLS))), None
        row, column = CELLS[place]
        text = _form(rng, "cell", it=name, cell=place)
        # what a side does not name stays: to the left keeps the height
        x, y = obj.x if column is None else None, obj.y if row is None else None
        spot = _spot(rng, obj.radius, others, size, lambda box: _in_cell(box, place, size), x=x, y=y)
        already = _in_cell(obj.box, place, size)
    if spot is None or already:
        return None
    moved = replace(obj, x=spot[0], y=spot[1])
    return _edit("position", text, scene, obj, moved, place=place, anchor=anchor)


def _background(rng: np.random.Generator, scene: Scene) -> Edit:
    tone = str(rng.choice([each for each in BACKGROUNDS if each != scene.background]))
    text = _form(rng, "background", tone=tone)
    return Edit("background", text, scene, replace(scene, background=tone), scene.objects)


def _nothing(rng: np.random.Generator, scene: Scene) -> Edit:
    return Edit("nothing", _form(rng, "nothing"), scene, scene, scene.objects)


_EDITS: dict[str, Callable[[np.random.Generator, Scene], Edit | None]] = {
    "color": _color,
    "count": _count,
    "position": _position,
    "background": _background,
    "nothing": _nothing,
}


def _edit(kind: str, text: str, scene: Scene, old: SceneObject | None, new: SceneObject | None, **rule: Any) -> Edit:
    """Return the edit that replaces `old` by `new`; None adds or removes."""
    kept = tuple(each for each in scene.objects if each is not old)
    target = replace(scene, objects=kept if new is None else (*kept, new))
    return Edit(kind, text, scene, target, kept, new, **rule)


def _form(rng: np.random.Generator, name: str, **slots: str) -> str:
    forms = FORMS[name]
    return forms[int(rng.integers(len(forms)))].format(**slots)


def _named(rng: np.random.Generator, scene: Scene) -> tuple[SceneObject | None, str]:
    """Sample an object and an expression that means it alone; None if the expression is not unique."""
    obj = scene.objects[int(rng.integers(len(scene.objects)))]
    if len(scene.objects) == 1 and rng.random() < 0.4:
        return obj, "it"
    alike = [each for each in scene.objects if each.shape == obj.shape]
    if len(alike) == 1 and rng.random() < 0.6:
        return obj, f"the {obj.shape}"
    unique = sum(each.color == obj.color for each in alike) == 1
    return (obj, f"the {obj.color} {obj.shape}") if unique else (None, "")


def _spot(
    rng: np.random.Generator,
    radius: float,
    others: Iterable[SceneObject],
    size: int,
    fits: Callable[[tuple[float, float, float, float]], bool],
    *,
    x: float | None = None,
    y: float | None = None,
) -> tuple[float, float] | None:
    """Sample a free center (x, y) whose box fits; a given coordinate is kept. None if none was found."""
    low, high, others = radius + MIN_BORDER, size - radius - MIN_BORDER, list(others)
    for a, b in rng.uniform(low, high, size=(SPOTS, 2)):
        at = (float(a) if x is None else x, float(b) if y is None else y)
        box = (at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)
        free = all(max(abs(at[0] - o.x), abs(at[1] - o.y)) >= radius + o.radius + MIN_GAP for o in others)
        if free and fits(box):
            return at
    return None


def _in_cell(box: tuple[float, float, float, float], name: str, size: int) -> bool:
    wanted, found = CELLS[name], cell_of(*_center(box), size)
    return all(want in (None, got) for want, got in zip(wanted, found, strict=True))


def _center(box: tuple[float, float, float, float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _near(a: Located, b: Located) -> bool:
    """Return whether two boxes agree in center and size."""
    offsets = np.subtract(_center(a.box), _center(b.box))
    sizes = (a.box[2] - a.box[0]) - (b.box[2] - b.box[0])
    return bool(np.abs(offsets).max() <= NEAR and abs(sizes) <= 2 * SAME_SIZE)
