"""Text-to-image prompts of the shapes data set, in GenEval's grammar (https://arxiv.org/abs/2310.11513; class = shape
name).

A prompt carries GenEval's rule metadata, so the benchmark's own verdict scores an image generated from it. The texts
are split into "train" and "test" by a hash of the text: a fifth of all wordings never occurs in training, whatever the
seed.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unimm.data.relations import RELATIONS, relative_position
from unimm.data.shapes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    WITHHELD,
    Scene,
    SceneObject,
    compose,
    sample_scene,
)
from unimm.english import NUMBERS, enumeration, plural, with_article
from unimm.errors import UserError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's six tags, which the rules of `unimm.evaluation.geneval` score."""
Split = Literal["train", "test"]
Rules = tuple[dict[str, Any], ...]

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
# Share of each kind of caption in training: the hard ones are more frequent. "scene" names one to four objects with
# their colors.
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
    """Return the split of a prompt, a pure function of its text."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] % TEST_SHARE == 0 else "train"


@dataclass(frozen=True)
class Prompt:
    """A text-to-image prompt with GenEval's rules (`include`, `exclude`); `background` is the background color that it
    names, if any."""

    tag: str
    prompt: str
    include: Rules
    exclude: Rules = ()
    background: str | None = None

    def metadata(self) -> dict[str, Any]:
        """Return GenEval's JSON object: tag, include, exclude (counting only) and prompt."""
        rules: dict[str, Any] = {"tag": self.tag, "include": [dict(rule) for rule in self.include]}
        if self.exclude:
            rules["exclude"] = [dict(rule) for rule in self.exclude]
        return rules | {"prompt": self.prompt}

    @property
    def names_withheld(self) -> bool:
        return any((rule.get("color"), rule["class"]) in WITHHELD for rule in self.include)


def _two_shapes(rng: np.random.Generator) -> list[str]:
    return [SHAPES[i] for i in rng.permutation(len(SHAPES))[:2]]


def _single_object(rng: np.random.Generator) -> tuple[str, Rules, Rules]:
    shape = str(rng.choice(SHAPES))
    return with_article(shape), ({"class": shape, "count": 1},), ()


def _two_object(rng: np.random.Generator) -> tuple[str, Rules, Rules]:
    a, b = _two_shapes(rng)
    return f"{with_article(a)} and {with_article(b)}", ({"class": a, "count": 1}, {"class": b, "count": 1}), ()


def _counting(rng: np.random.Generator) -> tuple[str, Rules, Rules]:
    shape, count = str(rng.choice(SHAPES)), int(rng.integers(2, 5))
    include, exclude = {"class": shape, "count": count}, {"class": shape, "count": count + 1}
    return f"{NUMBERS[count]} {plural(shape)}", (include,), (exclude,)


def _colors(rng: np.random.Generator) -> tuple[str, Rules, Rules]:
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
    return with_article(f"{color} {shape}"), ({"class": shape, "count": 1, "color": color},), ()


def _position(rng: np.random.Generator) -> tuple[str, Rules, Rules]:
    subject, anchor = _two_shapes(rng)
    relation = str(rng.choice(RELATIONS))
    include = ({"class": anchor, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]})
    return f"{with_article(subject)} {relation} {with_article(anchor)}", include, ()


def _color_attr(rng: np.random.Generator) -> tuple[str, Rules, Rules]:
    a, b = _two_shapes(rng)
    c, d = (list(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
    include = ({"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d})
    return f"{with_article(f'{c} {a}')} and {with_article(f'{d} {b}')}", include, ()


def _scene(rng: np.random.Generator) -> tuple[str, Rules, Rules]:
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
    """Sample a prompt of `split`; without a `tag`, the tag is sampled by TRAINING_SHARES (train) or uniformly (test).

    `withheld=True` returns prompts that name a withheld pair (tags "colors" and "color_attr"), for evaluation only.
    Without it no prompt names one. Raises UserError for an unknown tag or for withheld prompts of the training split.
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
        # Withheld prompts are held out by the pairs they name, so the hash split of their texts does not apply.
        if prompt.names_withheld == withheld and (withheld or split_of(prompt.prompt) == split):
            return prompt


def _draw_tag(rng: np.random.Generator, split: Split, withheld: bool) -> str:
    if withheld:
        return str(rng.choice(["colors", "color_attr"]))
    if split == "test":
        return str(rng.choice(TAGS))
    return str(rng.choice(list(TRAINING_SHARES), p=list(TRAINING_SHARES.values())))


def scene_for(rng: np.random.Generator, prompt: Prompt) -> Scene:
    """Sample a scene that matches the prompt and has no other objects; unspecified attributes are random."""
    colors = list(COLORS)
    while True:
        pairs: list[tuple[str, str]] = []
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
    """Sample a prompt of `split` and a scene that matches it."""
    prompt = sample_prompt(rng, split=split)
    return scene_for(rng, prompt), prompt
