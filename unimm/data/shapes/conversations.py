"""Questions and answers about scenes of the shapes data set; every answer is derived from the scene by rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimm.data.relations import relative_position
from unimm.data.shapes.things import NONE_THERE, THINGS
from unimm.data.shapes.world import COLORS, SHAPES, Scene, SceneObject, allowed_pairs, compose, sample_scene
from unimm.english import NUMBERS, enumeration, plural, with_article
from unimm.errors import UserError

PLACES = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))


@dataclass(frozen=True)
class Turn:
    """A question about a scene and its answer; `form` and `about`, the words that fill it, allow another wording
    (`unimm.data.shapes.phrasings`)."""

    kind: str
    question: str
    answer: str
    form: str = ""
    about: tuple[str, ...] = ()


def _name(obj: SceneObject) -> str:
    return f"{obj.color} {obj.shape}"


def _listing(scene: Scene) -> str:
    """List the objects from left to right."""
    return enumeration([with_article(_name(obj)) for obj in sorted(scene.objects, key=lambda obj: obj.x)])


def _existence(rng: np.random.Generator, scene: Scene) -> Turn | None:
    """Ask if an object exists: yes and no are equally likely, and half of the absent pairs combine a color and a shape
    that are both present."""
    present = {(o.color, o.shape) for o in scene.objects}
    shapes, colors = {o.shape for o in scene.objects}, {o.color for o in scene.objects}
    yes, form = bool(rng.random() < 0.5), int(rng.integers(4))
    if form == 0:
        thing = _pick(rng, [s for s in SHAPES if (s in shapes) == yes])
        return thing and Turn(*_yes_or_no(f"Is there {with_article(thing)}?", yes), "is_there", (thing,))
    if form == 1:
        thing = _pick(rng, [c for c in COLORS if (c in colors) == yes])
        return thing and Turn(*_yes_or_no(f"Is there anything {thing}?", yes), "anything", (thing,))
    pairs = sorted(present) if yes else [p for p in allowed_pairs(False) if p not in present]
    if not yes and rng.random() < 0.5:
        pairs = [p for p in pairs if p[0] in colors and p[1] in shapes] or pairs
    color, shape = _pick(rng, pairs)
    thing = f"{color} {shape}"
    return Turn(*_yes_or_no(f"Is there {with_article(thing)}?", yes), "is_there", (thing,))


def _yes_or_no(question: str, yes: bool) -> tuple[str, str, str]:
    return "existence", question, "yes" if yes else "no"


def _color(rng: np.random.Generator, scene: Scene) -> Turn | None:
    shapes = [o.shape for o in scene.objects]
    single = [o for o in scene.objects if shapes.count(o.shape) == 1]
    if not single:
        return None
    obj = _pick(rng, single)
    return Turn("color", f"What color is the {obj.shape}?", obj.color, "color_of", (obj.shape,))


def _count(rng: np.random.Generator, scene: Scene) -> Turn:
    form = int(rng.integers(4))
    if form == 0:
        return Turn("count", "How many objects are there?", NUMBERS[len(scene.objects)], "count_all")
    if form == 1:
        color = _pick(rng, [o.color for o in scene.objects]) if rng.random() < 0.8 else _pick(rng, list(COLORS))
        number = NUMBERS[sum(o.color == color for o in scene.objects)]
        return Turn("count", f"How many {color} objects are there?", number, "count_color", (color,))
    shape = _pick(rng, [o.shape for o in scene.objects]) if rng.random() < 0.8 else _pick(rng, list(SHAPES))
    number = NUMBERS[sum(o.shape == shape for o in scene.objects)]
    return Turn("count", f"How many {plural(shape)} are there?", number, "count_shape", (plural(shape),))


def _where(rng: np.random.Generator, scene: Scene) -> Turn | None:
    """Ask for the relation of two objects with unique names that have exactly one relation."""
    names = [_name(o) for o in scene.objects]
    unique = [o for o in scene.objects if names.count(_name(o)) == 1]
    couples = [(a, b) for a in unique for b in unique if a is not b and len(relative_position(a.box, b.box)) == 1]
    if not couples:
        return None
    a, b = _pick(rng, couples)
    (relation,) = relative_position(a.box, b.box)
    about = (_name(a), _name(b))
    return Turn("position", f"Where is the {about[0]} relative to the {about[1]}?", relation, "relative", about)


def _place(rng: np.random.Generator, scene: Scene) -> Turn | None:
    """Ask in which cell of a 3 x 3 grid the center of an object with a unique name lies."""
    names = [_name(o) for o in scene.objects]
    obj = _pick(rng, [o for o in scene.objects if names.count(_name(o)) == 1])
    if obj is None:
        return None
    row, column = cell_of(obj.x, obj.y, scene.image_size)
    return Turn("place", f"Where is the {_name(obj)}?", PLACES[row][column], "place", (_name(obj),))


def cell_of(x: float, y: float, image_size: int) -> tuple[int, int]:
    """Return row and column of PLACES that hold a point, in pixels."""
    row, column = (min(max(int(3 * at / image_size), 0), 2) for at in (y, x))
    return row, column


def _what(rng: np.random.Generator, scene: Scene) -> Turn:
    return Turn("what", _pick(rng, ["What is in the picture?", "What do you see?"]), f"{_listing(scene)}.", "what")


def _describe(rng: np.random.Generator, scene: Scene) -> Turn:
    question = _pick(rng, ["Describe the picture.", "Describe this image."])
    return Turn("describe", question, f"{describe(scene)}.", "describe")


def _unknown(rng: np.random.Generator, scene: Scene) -> Turn:
    """Ask for something that the world does not hold, or for the color or place of something that is not there."""
    thing, form = _pick(rng, THINGS), int(rng.integers(3))
    if form == 0:
        return Turn("unknown", f"Is there {with_article(thing)}?", "no", "is_there", (thing,))
    absent = [shape for shape in SHAPES if shape not in {o.shape for o in scene.objects}]
    noun = _pick(rng, absent) if rng.random() < 0.5 else thing
    if form == 1:
        return Turn("unknown", f"What color is the {noun}?", NONE_THERE, "color_of", (noun,))
    return Turn("unknown", f"Where is the {noun}?", NONE_THERE, "place", (noun,))


def _pick(rng: np.random.Generator, options: Sequence) -> Any:
    """Sample one of the options; None if there are none."""
    return options[int(rng.integers(len(options)))] if options else None


_QUESTIONS: dict[str, Callable[[np.random.Generator, Scene], Turn | None]] = {
    "existence": _existence,
    "color": _color,
    "count": _count,
    "position": _where,
    "place": _place,
    "what": _what,
    "describe": _describe,
    "unknown": _unknown,
}
KINDS = tuple(_QUESTIONS)
KIND_SHARES = dict(zip(KINDS, (0.2, 0.15, 0.2, 0.25, 0.1, 0.04, 0.06, 0.0), strict=True))
"""Share of each kind of question; "unknown" is about what the world does not hold."""


def sample_talking_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene for a conversation: half of them repeat shapes or colors, so that counting is not trivial."""
    if rng.random() < 0.5:
        return sample_scene(rng)
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[: int(rng.integers(1, 4))]]
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[: int(rng.integers(1, 4))]]
    pool = [p for p in allowed_pairs(False) if p[0] in colors and p[1] in shapes]
    if not pool:
        return sample_scene(rng)
    return compose(rng, [pool[i] for i in rng.integers(len(pool), size=int(rng.integers(1, 5)))])


def sample_conversation(
    rng: np.random.Generator, *, num_turns: int | None = None, kind_shares: Mapping[str, float] | None = None
) -> tuple[Scene, list[Turn]]:
    """Sample a scene and `num_turns` different questions about it (None: 3 to 8), of kinds by `kind_shares` (None:
    KIND_SHARES).

    Raises:
        UserError: a kind is unknown, a share is negative, or no share is above 0.
    """
    wanted = int(rng.integers(3, 9)) if num_turns is None else num_turns
    shares = normalized_shares(KIND_SHARES if kind_shares is None else kind_shares, KINDS, "question")
    scene, turns, asked = sample_talking_scene(rng), [], set()
    for _ in range(
        20 * wanted
    ):  # a scene of one object has few questions of some kinds: the conversation may end early
        turn = _QUESTIONS[str(rng.choice(KINDS, p=shares))](rng, scene)
        if turn is not None and turn.question not in asked:
            asked.add(turn.question)
            turns.append(turn)
        if len(turns) == wanted:
            break
    return scene, turns


def normalized_shares(given: Mapping[str, float], kinds: Sequence[str], what: str) -> np.ndarray:
    """Return the shares of `kinds` normalized to sum to 1; a kind that is not given has none.

    Args:
        what: the word for what has these kinds in an error.

    Raises:
        UserError: for an unknown kind, a negative share, or if all are 0.
    """
    if unknown := sorted(given.keys() - set(kinds)):
        raise UserError(f"There is no {what} kind {unknown[0]!r}; the kinds are {', '.join(kinds)}.")
    shares = np.array([given.get(kind, 0.0) for kind in kinds], dtype=np.float64)
    if shares.min() < 0 or shares.sum() <= 0:
        raise UserError(f"The shares of the {what} kinds must be 0 or more, one of them above 0, got {dict(given)}.")
    return shares / shares.sum()


def sample_questions(rng: np.random.Generator, kind: str) -> tuple[Scene, Turn]:
    """Sample a scene and one question of `kind` about it. Raises UserError for an unknown kind."""
    if kind not in _QUESTIONS:
        raise UserError(f"There is no question kind {kind!r}; the kinds are {', '.join(KINDS)}.")
    while True:
        scene = sample_talking_scene(rng)
        turn = _QUESTIONS[kind](rng, scene)
        if turn is not None:
            return scene, turn


def describe(scene: Scene) -> str:
    """Describe the whole scene in one line: its objects from left to right, and the background."""
    return f"{_listing(scene)} on {with_article(scene.background)} background"
