"""GenEval's 553 prompts, generated from its grammar (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513).

One random stream, consumed in the order of the tags, reproduces the official list byte for byte: prompts, order and
metadata. Exact duplicates are dropped, so each tag has at most 100 prompts. The grammar's oddities are the benchmark's
and are kept: "two benchs", "a skis", no colored person. Any other file of prompts is a track of its own: rewritten
prompts are easier, and a score on them is not a GenEval score.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimm.data.relations import RELATIONS
from unimm.english import NUMBERS, plural, with_article
from unimm.errors import UserError, one_line
from unimm.evaluation.geneval.rules import COCO_CLASSES, COLORS, TAGS

Metadata = dict[str, Any]

OFFICIAL_SEED = 43
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
OFFICIAL_TRACK = "geneval"
REWRITTEN_TRACK = "geneval-rewritten"
OWN_TRACK = "geneval-own-prompts"

_DRAWS = 100  # prompts sampled per tag, before duplicates are dropped
_PERSON = COCO_CLASSES.index("person")


class PromptTrack(NamedTuple):
    """A named list of prompts to draw and score, with one line of metadata per prompt."""

    name: str
    prompts: list[Metadata]

    @property
    def sha256(self) -> str:
        """Return the hash of the prompts as JSONL."""
        return hashlib.sha256(to_jsonl(self.prompts).encode()).hexdigest()


def official_prompts(seed: int = OFFICIAL_SEED) -> list[Metadata]:
    """Generate the official generator's list; the default seed is that of the published prompts."""
    rng = np.random.default_rng(seed)
    drawn = [
        *_single_object(rng),
        *_several(_two_object, rng),
        *_several(_counting, rng),
        *_several(_colors, rng),
        *_several(_position, rng),
        *_several(_color_attr, rng),
    ]
    # Duplicates are dropped and not redrawn, which would change the random stream.
    return [json.loads(line) for line in dict.fromkeys(json.dumps(each) for each in drawn)]


def to_jsonl(prompts: Iterable[Mapping[str, Any]]) -> str:
    """Format prompts as one JSON object per line, as in `evaluation_metadata.jsonl`."""
    return "".join(json.dumps(prompt) + "\n" for prompt in prompts)


def read_prompts(path: str | Path) -> PromptTrack:
    """Read a user's prompts, one JSON object of metadata per line.

    The track is `geneval` only if every line is official; the same rules with other words are `geneval-rewritten`,
    other rules `geneval-own-prompts`.

    Raises:
        UserError: the file cannot be read, or a line has no tag, rules or prompt that can be scored.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the prompts {path}: {one_line(error)}.") from None
    prompts = [check_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: each line is a JSON object with tag, include and prompt.")
    return PromptTrack(track_of(prompts), prompts)


def track_of(prompts: Sequence[Mapping[str, Any]]) -> str:
    """Return the track that a list of prompts belongs to; a subset of the official list is still official."""
    official = {json.dumps(each, sort_keys=True) for each in official_prompts()}
    if all(json.dumps(each, sort_keys=True) in official for each in prompts):
        return OFFICIAL_TRACK
    rules = {_rules(each) for each in official_prompts()}
    return REWRITTEN_TRACK if all(_rules(each) in rules for each in prompts) else OWN_TRACK


def check_prompt(text: str, source: str) -> Metadata:
    """Parse and validate one line of metadata.

    Raises:
        UserError: the rules cannot be applied to it; the message starts with `source`.
    """
    try:
        prompt = json.loads(text)
        include, tag, words = prompt["include"], prompt["tag"], str(prompt["prompt"]).strip()
        rules = [*include, *prompt.get("exclude", ())]
        counts, names = [int(rule["count"]) for rule in rules], [str(rule["class"]) for rule in rules]
        colors = [rule["color"] for rule in include if "color" in rule]
        positions = [(*rule["position"], index) for index, rule in enumerate(include) if "position" in rule]
        lost = [name for name, target, index in positions if name not in RELATIONS or not 0 <= target < index]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{source} is no GenEval metadata with tag, include and prompt ({reason}).") from None
    if tag not in TAGS:
        raise UserError(f"{source} has the tag {tag!r}; GenEval has {', '.join(TAGS)}.")
    if not include or not words or min(counts) < 1:
        raise UserError(f"{source} asks for nothing: it needs a prompt and rules with counts from 1.")
    if unknown := [color for color in colors if color not in COLORS]:
        raise UserError(f"{source} names the colour {unknown[0]!r}; the colours are {', '.join(COLORS)}.")
    if lost:
        raise UserError(f"{source} has a position without a meaning: give [relation, index of an earlier rule].")
    if "" in names:
        raise UserError(f"{source} names a class without letters.")
    return prompt


# ---- the grammar, one function per tag -----------------------------------------------------------------------------


def _several(make: Callable[[np.random.Generator], Metadata], rng: np.random.Generator) -> list[Metadata]:
    return [make(rng) for _ in range(_DRAWS)]


def _single_object(rng: np.random.Generator) -> list[Metadata]:
    names = [COCO_CLASSES[index] for index in rng.choice(len(COCO_CLASSES), size=len(COCO_CLASSES), replace=False)]
    return [_metadata("single_object", [_rule(name)], with_article(name)) for name in names]


def _two_object(rng: np.random.Generator) -> Metadata:
    a, b = (COCO_CLASSES[index] for index in rng.choice(len(COCO_CLASSES), size=2, replace=False))
    return _metadata("two_object", [_rule(a), _rule(b)], f"{with_article(a)} and {with_article(b)}")


def _counting(rng: np.random.Generator) -> Metadata:
    name = COCO_CLASSES[rng.choice(len(COCO_CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    wanted, unwanted = _rule(name, count), _rule(name, count + 1)
    return _metadata("counting", [wanted], f"{NUMBERS[count]} {plural(name)}", exclude=[unwanted])


def _colors(rng: np.random.Generator) -> Metadata:
    name = _anything_but_a_person(rng.choice(len(COCO_CLASSES) - 1))
    color = COLORS[rng.choice(len(COLORS))]
    return _metadata("colors", [_rule(name, color=color)], with_article(f"{color} {name}"))


def _position(rng: np.random.Generator) -> Metadata:
    subject, anchor = (COCO_CLASSES[index] for index in rng.choice(len(COCO_CLASSES), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    words = f"{with_article(subject)} {relation} {with_article(anchor)}"
    return _metadata("position", [_rule(anchor), _rule(subject, position=[relation, 0])], words)


def _color_attr(rng: np.random.Generator) -> Metadata:
    drawn = rng.choice(len(COCO_CLASSES) - 1, size=2, replace=False)
    a, b = (_anything_but_a_person(index) for index in drawn)
    color_a, color_b = (COLORS[index] for index in rng.choice(len(COLORS), size=2, replace=False))
    words = f"{with_article(f'{color_a} {a}')} and {with_article(f'{color_b} {b}')}"
    return _metadata("color_attr", [_rule(a, color=color_a), _rule(b, color=color_b)], words)


def _anything_but_a_person(index: int) -> str:
    return COCO_CLASSES[(int(index) + 1 + _PERSON) % len(COCO_CLASSES)]


def _rule(name: str, count: int = 1, **more: Any) -> Metadata:
    return {"class": name, "count": count, **more}


def _metadata(tag: str, include: list[Metadata], words: str, exclude: list[Metadata] | None = None) -> Metadata:
    rules: Metadata = {"tag": tag, "include": include}
    if exclude:
        rules["exclude"] = exclude
    return rules | {"prompt": f"a photo of {words}"}


def _rules(prompt: Mapping[str, Any]) -> str:
    return json.dumps({name: prompt.get(name) for name in ("tag", "include", "exclude")}, sort_keys=True)
