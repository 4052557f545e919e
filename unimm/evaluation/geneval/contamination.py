"""Contamination check: count training captions that match GenEval's prompts exactly, normalized, or by template.

Training data generated from GenEval's grammar ("a photo of a C1 X and a C2 Y") raises the score without copying a
single prompt. Captions that fit the grammar are therefore counted separately: once with the benchmark's own classes and
colors, once with any nouns in place of the classes.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimm.data.relations import RELATIONS
from unimm.english import NUMBERS, plural
from unimm.errors import UserError, one_line
from unimm.evaluation.geneval.rules import COCO_CLASSES, COLORS

CAPTION_KEYS = ("caption", "text", "prompt")
EXAMPLES = 5  # captions kept per kind of match
_COCO_OWN_NAMES = ("mouse", "remote", "keyboard")  # COCO's names of computer mouse, tv remote, computer keyboard
_NOUN = r"[a-z]+(?: [a-z]+){0,2}"  # one to three words
_ARTICLE = "an? "


@dataclass
class Overlap:
    """Counts of captions by kind of match, the prompts that were found, and a few captions per kind."""

    captions: int = 0
    exact: int = 0
    normalized: int = 0
    template: dict[str, int] = field(default_factory=dict)
    template_any_class: dict[str, int] = field(default_factory=dict)
    prompts_met: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Format one line per kind of match."""
        kinds = {"exact": self.exact, "normalized": self.normalized}
        kinds |= {"template": sum(self.template.values()), "any class": sum(self.template_any_class.values())}
        shares = [f"{name:<12} {count:>8} of {self.captions} captions" for name, count in kinds.items()]
        return [*shares, f"{'prompts met':<12} {len(self.prompts_met):>8}"]


def normalize_caption(text: str) -> str:
    """Lowercase the text and keep only letters, digits and single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def overlap(captions: Iterable[str], prompts: Sequence[str]) -> Overlap:
    """Compare captions with prompts. Each caption counts once: as exact, else normalized, else by template."""
    exact, normalized = set(prompts), {normalize_caption(prompt): prompt for prompt in prompts}
    closed, any_class = _templates(_words(COCO_CLASSES), _words(COLORS)), _templates(_NOUN, _words(COLORS))
    result, met = Overlap(), set[str]()
    for caption in captions:
        result.captions += 1
        plain = normalize_caption(caption)
        if caption in exact:
            result.exact += 1
            met.add(caption)
            kind = "exact"
        elif plain in normalized:
            result.normalized += 1
            met.add(normalized[plain])
            kind = "normalized"
        elif tag := _first_match(closed, plain):
            result.template[tag] = result.template.get(tag, 0) + 1
            kind = "template"
        elif tag := _first_match(any_class, plain):
            result.template_any_class[tag] = result.template_any_class.get(tag, 0) + 1
            kind = "any class"
        else:
            continue
        shown = result.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            shown.append(caption)
    result.prompts_met = sorted(met)
    return result


def read_captions(path: str | Path) -> Iterator[str]:
    """Yield the captions of a text file, one per line, or of a JSONL file with `caption`, `text` or `prompt`.

    Raises:
        UserError: the file cannot be read, or a line of JSON has no caption.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _caption(line, f"{path}, line {number}") if path.suffix == ".jsonl" else line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the captions {path}: {one_line(error)}.") from None


def _caption(line: str, source: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{source} is no JSON: {one_line(error)}.") from None
    if isinstance(row, str):
        return row
    found = [row[key] for key in CAPTION_KEYS if isinstance(row, dict) and isinstance(row.get(key), str)]
    if not found:
        raise UserError(f"{source} has no caption: give one of {', '.join(CAPTION_KEYS)}.")
    return found[0]


def _words(names: Sequence[str]) -> str:
    """Build a pattern that matches any of the names, longer ones first; classes include COCO's original names."""
    known = {*names, *(_COCO_OWN_NAMES if names is COCO_CLASSES else ())}
    return "|".join(sorted(known, key=lambda name: (-len(name), name)))


def _templates(noun: str, color: str) -> dict[str, re.Pattern[str]]:
    """Compile the grammar's pattern per tag; single objects only for known nouns, else any object would match."""
    some, colored = f"{_ARTICLE}(?:{noun})", f"{_ARTICLE}(?:{color}) (?:{noun})"
    numbers = "|".join(NUMBERS[2:5])
    many = noun if noun == _NOUN else "|".join(_plurals(noun.split("|")))
    patterns = {
        "color_attr": f"{colored} and {colored}",
        "colors": colored,
        "position": f"{some} (?:{'|'.join(RELATIONS)}) {some}",
        "two_object": f"{some} and {some}",
        "counting": f"(?:{numbers}) (?:{many})",
    }
    if noun != _NOUN:
        patterns["single_object"] = some
    return {tag: re.compile(f"a photo of (?:{pattern})") for tag, pattern in patterns.items()}


def _plurals(names: Sequence[str]) -> list[str]:
    naive = {plural(name) for name in names}
    proper = {name + "es" for name in names if name.endswith(("s", "ch", "sh", "x"))}
    return sorted(naive | proper, key=lambda name: (-len(name), name))


def _first_match(patterns: dict[str, re.Pattern[str]], text: str) -> str | None:
    return next((tag for tag, pattern in patterns.items() if pattern.fullmatch(text)), None)
