"""What is said about scenes: prompts in GenEval's grammar and conversations, each exact by rule.

Prompts carry GenEval's rule metadata (arXiv 2310.11513; class = shape name), so the benchmark's own verdict scores
them. The texts are split into "train" and "test" by a hash of the text itself: a fifth of all wordings never occurs in
training, whatever the seed.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unimm.data.shapes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    WITHHELD,
    Scene,
    SceneObject,
    allowed_pairs,
    compose,
    sample_scene,
)
from unimm.errors import UserError
from unimm.evaluation.geneval import TAGS, relative_position

Split = Literal["train", "test"]
Pair = tuple[str, str]  # (color, shape)

RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
OPENINGS = tuple(
    f"{article} {noun} of"
    for article, noun in (
        ("a", "photo"),
        ("a", "picture"),
        ("an", "image"),
        ("a", "drawing"),
        ("a", "painting"),
        ("a", "sketch"),
        ("an", "illustration"),
        ("a", "rendering"),
        ("a", "print"),
        ("a", "view"),
    )
)
TEST_SHARE = 5  # one text in TEST_SHARE is kept for evaluation
# How often each kind of caption is drawn in training: the hard ones more often. "scene" names one to four objects with
# their colours.
TRAINING_SHARES = {
    "single_object": 0.08,
    "two_object": 0.12,
    "counting": 0.20,
    "colors": 0.12,
    "position": 0.22,
    "color_attr": 0.18,
    "scene": 0.08,
}
BACKGROUND_SHARE = 0.5  # how often a prompt also names the background


def split_of(text: str) -> Split:
    """Which split a prompt's text belongs to: a pure function of the text."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """GenEval's naive plural: +es after s, else +s."""
    return noun + ("es" if noun.endswith("s") else "s")


def enumeration(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


@dataclass(frozen=True)
class Prompt:
    """A text-to-image prompt with GenEval's rules; `pairs` and `background` say what a training picture of it must
    show."""

    tag: str
    prompt: str
    include: tuple[dict[str, Any], ...]
    exclude: tuple[dict[str, Any], ...] = ()
    background: str | None = None

    def metadata(self) -> dict[str, Any]:
        """GenEval's JSON object: tag, include, exclude (counting only) and prompt."""
        rules: dict[str, Any] = {"tag": self.tag, "include": [dict(rule) for rule in self.include]}
        if self.exclude:
            rules["exclude"] = [dict(rule) for rule in self.exclude]
        return rules | {"prompt": self.prompt}

    @property
    def names_withheld(self) -> bool:
        return any((rule.get("color"), rule["class"]) in WITHHELD for rule in self.include)


@dataclass(frozen=True)
class Turn:
    """One question about a scene and its answer."""

    kind: str
    question: str
    answer: str


# ---- prompts ----


def _two_shapes(rng: np.random.Generator) -> list[str]:
    return [SHAPES[i] for i in rng.permutation(len(SHAPES))[:2]]


def _single_object(rng: np.random.Generator) -> tuple[str, tuple[dict, ...], tuple[dict, ...]]:
    shape = str(rng.choice(SHAPES))
    return with_article(shape), ({"class": shape, "count": 1},), ()


def _two_object(rng: np.random.Generator) -> tuple[str, tuple[dict, ...], tuple[dict, ...]]:
    a, b = _two_shapes(rng)
    return f"{with_article(a)} and {with_article(b)}", ({"class": a, "count": 1}, {"class": b, "count": 1}), ()


def _counting(rng: np.random.Generator) -> tuple[str, tuple[dict, ...], tuple[dict, ...]]:
    shape, count = str(rng.choice(SHAPES)), int(rng.integers(2, 5))
    include, exclude = {"class": shape, "count": count}, {"class": shape, "count": count + 1}
    return f"{NUMBERS[count]} {plural(shape)}", (include,), (exclude,)


def _colors(rng: np.random.Generator) -> tuple[str, tuple[dict, ...], tuple[dict, ...]]:
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
    return with_article(f"{color} {shape}"), ({"class": shape, "count": 1, "color": color},), ()


def _position(rng: np.random.Generator) -> tuple[str, tuple[dict, ...], tuple[dict, ...]]:
    subject, anchor = _two_shapes(rng)
    relation = str(rng.choice(RELATIONS))
    include = ({"class": anchor, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]})
    return f"{with_article(subject)} {relation} {with_article(anchor)}", include, ()


def _color_attr(rng: np.random.Generator) -> tuple[str, tuple[dict, ...], tuple[dict, ...]]:
    a, b = _two_shapes(rng)
    c, d = (list(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
    include = ({"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d})
    return f"{with_article(f'{c} {a}')} and {with_article(f'{d} {b}')}", include, ()


def _scene(rng: np.random.Generator) -> tuple[str, tuple[dict, ...], tuple[dict, ...]]:
    pairs = [(obj.color, obj.shape) for obj in sample_scene(rng).objects]
    include = tuple({"class": shape, "count": 1, "color": color} for color, shape in pairs)
    return enumeration([with_article(f"{c} {s}") for c, s in pairs]), include, ()


_GRAMMAR: dict[str, Callable] = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
    "scene": _scene,
}


def sample_prompt(
    rng: np.random.Generator, tag: str | None = None, *, split: Split = "train", withheld: bool = False
) -> Prompt:
    """A random prompt of `split`; `tag` None draws one by TRAINING_SHARES (train) or uniformly (test).

    `withheld=True` gives prompts that name a withheld pair (tags "colors" and "color_attr"): evaluation only. Without
    it no prompt names one. Raises UserError for an unknown tag or for withheld prompts of the training split.
    """
    if tag is not None and tag not in _GRAMMAR:
        raise UserError(f"There is no prompt tag {tag!r}; the tags are {', '.join(_GRAMMAR)}.")
    if withheld and split == "train":
        raise UserError("Prompts that name a withheld pair are for evaluation: ask for split='test'.")
    while True:
        name = tag or _draw_tag(rng, split, withheld)
        text, include, exclude = _GRAMMAR[name](rng)
        background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < BACKGROUND_SHARE else None
        opening = OPENINGS[int(rng.integers(len(OPENINGS)))]
        ending = f" on {with_article(background)} background" if background else ""
        prompt = Prompt(name, f"{opening} {text}{ending}", include, exclude, background)
        # Withheld prompts are held out by what they name, so that both halves of their texts may be asked.
        if prompt.names_withheld == withheld and (withheld or split_of(prompt.prompt) == split):
            return prompt


def _draw_tag(rng: np.random.Generator, split: Split, withheld: bool) -> str:
    if withheld:
        return str(rng.choice(["colors", "color_attr"]))
    if split == "test":
        return str(rng.choice(TAGS))
    return str(rng.choice(list(TRAINING_SHARES), p=list(TRAINING_SHARES.values())))


def scene_for(rng: np.random.Generator, prompt: Prompt) -> Scene:
    """A scene that fulfils the prompt and holds nothing else; what the prompt leaves open is drawn at random."""
    colors = list(COLORS)
    while True:
        pairs: list[Pair] = []
        for rule in prompt.include:
            for _ in range(rule["count"]):
                free = [c for c in colors if (c, rule["class"]) not in WITHHELD]
                pairs.append((rule.get("color") or str(rng.choice(free)), rule["class"]))
        scene = compose(rng, pairs, prompt.background)
        if all(_holds(rule, i, scene.objects) for i, rule in enumerate(prompt.include)):
            return scene


def _holds(rule: dict[str, Any], index: int, objects: Sequence[SceneObject]) -> bool:
    if "position" not in rule:
        return True
    relation, target = rule["position"]
    return relative_position(objects[index].box, objects[target].box) == {relation}


def sample_captioned_scene(rng: np.random.Generator, *, split: Split = "train") -> tuple[Scene, Prompt]:
    """A prompt of `split` and a scene that shows it."""
    prompt = sample_prompt(rng, split=split)
    return scene_for(rng, prompt), prompt


# ---- conversations ----


def _name(obj: SceneObject) -> str:
    return f"{obj.color} {obj.shape}"


def _listing(scene: Scene) -> str:
    """The objects from left to right."""
    return enumeration([with_article(_name(obj)) for obj in sorted(scene.objects, key=lambda obj: obj.x)])


def _existence(rng: np.random.Generator, scene: Scene) -> Turn | None:
    """Yes and no are equally likely; half of the wrong pairs join a colour and a shape that are both there."""
    present = {(o.color, o.shape) for o in scene.objects}
    shapes, colors = {o.shape for o in scene.objects}, {o.color for o in scene.objects}
    yes, form = bool(rng.random() < 0.5), int(rng.integers(4))
    if form == 0:
        thing = _pick(rng, [s for s in SHAPES if (s in shapes) == yes])
        return thing and Turn("existence", f"Is there {with_article(thing)}?", "yes" if yes else "no")
    if form == 1:
        thing = _pick(rng, [c for c in COLORS if (c in colors) == yes])
        return thing and Turn("existence", f"Is there anything {thing}?", "yes" if yes else "no")
    pairs = sorted(present) if yes else [p for p in allowed_pairs(False) if p not in present]
    if not yes and rng.random() < 0.5:
        pairs = [p for p in pairs if p[0] in colors and p[1] in shapes] or pairs
    color, shape = _pick(rng, pairs)
    return Turn("existence", f"Is there {with_article(f'{color} {shape}')}?", "yes" if yes else "no")


def _color(rng: np.random.Generator, scene: Scene) -> Turn | None:
    shapes = [o.shape for o in scene.objects]
    single = [o for o in scene.objects if shapes.count(o.shape) == 1]
    if not single:
        return None
    obj = _pick(rng, single)
    return Turn("color", f"What color is the {obj.shape}?", obj.color)


def _count(rng: np.random.Generator, scene: Scene) -> Turn:
    form = int(rng.integers(4))
    if form == 0:
        return Turn("count", "How many objects are there?", NUMBERS[len(scene.objects)])
    if form == 1:
        color = _pick(rng, [o.color for o in scene.objects]) if rng.random() < 0.8 else _pick(rng, list(COLORS))
        return Turn(
            "count", f"How many {color} objects are there?", NUMBERS[sum(o.color == color for o in scene.objects)]
        )
    shape = _pick(rng, [o.shape for o in scene.objects]) if rng.random() < 0.8 else _pick(rng, list(SHAPES))
    return Turn("count", f"How many {plural(shape)} are there?", NUMBERS[sum(o.shape == shape for o in scene.objects)])


def _where(rng: np.random.Generator, scene: Scene) -> Turn | None:
    """The relation of two objects that a name tells apart and that stand in exactly one relation."""
    names = [_name(o) for o in scene.objects]
    unique = [o for o in scene.objects if names.count(_name(o)) == 1]
    couples = [(a, b) for a in unique for b in unique if a is not b and len(relative_position(a.box, b.box)) == 1]
    if not couples:
        return None
    a, b = _pick(rng, couples)
    (relation,) = relative_position(a.box, b.box)
    return Turn("position", f"Where is the {_name(a)} relative to the {_name(b)}?", relation)


def _what(rng: np.random.Generator, scene: Scene) -> Turn:
    return Turn("what", _pick(rng, ["What is in the picture?", "What do you see?"]), f"{_listing(scene)}.")


def _describe(rng: np.random.Generator, scene: Scene) -> Turn:
    question = _pick(rng, ["Describe the picture.", "Describe this image."])
    return Turn("describe", question, f"{describe(scene)}.")


def _pick(rng: np.random.Generator, options: Sequence) -> Any:
    """One of the options, None when there is none."""
    return options[int(rng.integers(len(options)))] if options else None


_QUESTIONS: dict[str, Callable[[np.random.Generator, Scene], Turn | None]] = {
    "existence": _existence,
    "color": _color,
    "count": _count,
    "position": _where,
    "what": _what,
    "describe": _describe,
}
KINDS = tuple(_QUESTIONS)
_KIND_SHARES = (0.22, 0.18, 0.24, 0.24, 0.04, 0.08)


def sample_talking_scene(rng: np.random.Generator) -> Scene:
    """A scene to talk about: half of them repeat shapes or colours, so that counting is a question."""
    if rng.random() < 0.5:
        return sample_scene(rng)
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[: int(rng.integers(1, 4))]]
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[: int(rng.integers(1, 4))]]
    pool = [p for p in allowed_pairs(False) if p[0] in colors and p[1] in shapes]
    if not pool:
        return sample_scene(rng)
    return compose(rng, [pool[i] for i in rng.integers(len(pool), size=int(rng.integers(1, 5)))])


def sample_conversation(rng: np.random.Generator, *, num_turns: int | None = None) -> tuple[Scene, list[Turn]]:
    """A scene and `num_turns` different questions about it (None: 3 to 8)."""
    wanted = int(rng.integers(3, 9)) if num_turns is None else num_turns
    scene, turns, asked = sample_talking_scene(rng), [], set()
    for _ in range(
        20 * wanted
    ):  # a scene of one object has few questions of some kinds: the conversation may end early
        turn = _QUESTIONS[str(rng.choice(KINDS, p=_KIND_SHARES))](rng, scene)
        if turn is not None and turn.question not in asked:
            asked.add(turn.question)
            turns.append(turn)
        if len(turns) == wanted:
            break
    return scene, turns


def sample_questions(rng: np.random.Generator, kind: str) -> tuple[Scene, Turn]:
    """A fresh scene and one question of `kind` about it. Raises UserError for an unknown kind."""
    if kind not in _QUESTIONS:
        raise UserError(f"There is no question kind {kind!r}; the kinds are {', '.join(KINDS)}.")
    while True:
        scene = sample_talking_scene(rng)
        turn = _QUESTIONS[kind](rng, scene)
        if turn is not None:
            return scene, turn


def describe(scene: Scene) -> str:
    """The whole scene in one line: its objects from left to right, and the background."""
    return f"{_listing(scene)} on {with_article(scene.background)} background"
