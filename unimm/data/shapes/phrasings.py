"""Many wordings of drawing requests and of questions about scenes of the shapes data set.

Every wording belongs to a named kind (`REQUEST_KINDS`, `QUESTION_KINDS`). HELD_OUT kinds and the words of UNSEEN_WORDS
never occur in training: they measure how far what was learned carries to other wordings.
What a request asks for and how a question is answered is unchanged: only the text is another.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unimm.data.shapes.conversations import Turn
from unimm.data.shapes.prompts import Prompt, Split, sample_prompt, split_of
from unimm.data.shapes.things import THINGS
from unimm.data.shapes.world import BACKGROUNDS, COLORS, SHAPES
from unimm.english import NUMBERS, enumeration, plural, with_article

CAPTION, TYPED, BRITISH = "caption", "typed", "british"

# Slots of requests: {a} "a red circle and two squares", {bare} "red circle and 2 squares", {list} "red circle, two
# squares", {on} " on a white background" (or nothing), {tone} "white". A wording with {tone} needs a background.
REQUESTS: dict[str, tuple[str, ...]] = {
    "bare": ("{bare}{on}", "{bare}{on}.", "{a}{on}", "{a}{on}."),
    "imperative": (
        *("Draw {a}{on}.", "Draw me {a}{on}.", "Make {a}{on}.", "Paint {a}{on}.", "Create {a}{on}."),
        *("Draw a picture of {a}{on}.", "Make a picture of {a}{on}.", "Generate an image of {a}{on}."),
    ),
    "please": (
        *("Please draw {a}{on}.", "Please draw {a}{on} for me.", "Draw {a}{on}, please.", "{a}{on}, please."),
        *("Please make a picture of {a}{on}.", "Please paint {a}{on} for me."),
    ),
    "can_you": (
        *("Can you draw {a}{on}?", "Could you draw {a}{on} for me?", "Can you paint {a}{on}, please?"),
        *("Could you please draw {a}{on}?", "Can you make a picture of {a}{on}?"),
    ),
    "wish": (
        *("I'd like {a}{on}.", "I would like a picture of {a}{on}.", "I'd like to see {a}{on}.", "I want {a}{on}."),
        *("I'd like you to draw {a}{on}.", "I want an image of {a}{on}, please."),
    ),
    "background_first": (
        *("On a {tone} background, {a}.", "On a {tone} background: {a}", "On a {tone} background, draw {a}."),
        *("{tone} background, {list}", "A {tone} background with {a}."),
    ),
    "list": ("{list}{comma}", "Draw: {list}{comma}", "A picture with {list}{comma}."),
    "sentences": (
        *(
            "The picture shows {a}. The background is {tone}.",
            "Draw {a}. The background is {tone}.",
            "A picture. It shows {a}{on}.",
        ),
        *(
            "Please draw {a}. Make the background {tone}.",
            "The background is {tone}. Draw {a}.",
            "I'd like a drawing. {a}{on}.",
        ),
    ),
    BRITISH: (
        *("Draw {a}. The colour of the background is {tone}.", "Please colour the background {tone} and draw {a}."),
        *("Please draw {a}, with {tone} as the background colour.", "Can you draw {a}{on}?"),
    ),
    TYPED: (),  # a wording of another kind without capitals and punctuation
    "show": ("Show me {a}{on}.", "Please show me {a}{on}."),
    "need": ("I need {a}{on}.", "I need an image of {a}{on}."),
    "would_you": ("Would you draw {a}{on}?", "Would you mind drawing {a}{on}?"),
    "thanks": ("{a}{on}, thanks!", "Draw {a}{on}, thank you."),
    "other_verbs": ("Sketch {a}{on}.", "Produce {a}{on}.", "Render an image of {a}{on}."),
}

# Questions by kind and form (`Turn.form`), with the slots of `Turn.about`: {x}, {y}; {a} has the article.
QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "see": {
        "is_there": ("Do you see {a}?", "Can you see {a}?"),
        "anything": ("Do you see anything {x}?", "Can you see anything {x}?"),
        "count_all": ("How many objects do you see?", "How many objects can you see?"),
        "count_color": ("How many {x} objects do you see?", "How many {x} objects can you see?"),
        "count_shape": ("How many {x} do you see?", "How many {x} can you see?"),
        "what": ("What can you see?", "What do you see here?"),
        "describe": ("Describe what you see.",),
    },
    "picture": {
        "is_there": ("Is there {a} in the picture?", "Does the picture show {a}?", "Is {a} in this image?"),
        "anything": ("Is there anything {x} in the picture?", "Is anything {x} in this image?"),
        "color_of": ("What color is the {x} in the picture?", "What is the color of the {x}?"),
        "count_all": ("How many objects are in the picture?", "How many things are there in this image?"),
        "count_color": ("How many {x} objects are in the picture?", "How many {x} things are there?"),
        "count_shape": ("How many {x} are in the picture?", "How many {x} are there in this image?"),
        "relative": ("In the picture, where is the {x} relative to the {y}?",),
        "place": ("Where in the picture is the {x}?", "Where is the {x} in this image?"),
        "what": ("What does the picture show?", "What is in this image?"),
        "describe": ("Give a description of the picture.",),
    },
    "count": {
        "count_all": ("Count the objects.", "Count the objects in this picture.", "Count all objects."),
        "count_color": ("Count the {x} objects.", "Count the {x} objects in this picture."),
        "count_shape": ("Count the {x}.", "Count the {x} in this picture."),
    },
    "tell": {
        "is_there": ("Tell me if there is {a}.",),
        "color_of": ("Tell me the color of the {x}.", "Tell me what color the {x} is."),
        "count_all": ("Tell me how many objects there are.", "Tell me the number of objects."),
        "count_color": ("Tell me how many {x} objects there are.", "Tell me the number of {x} objects."),
        "count_shape": ("Tell me how many {x} there are.", "Tell me the number of {x}."),
        "relative": ("Tell me where the {x} is relative to the {y}.",),
        "place": ("Tell me where the {x} is.",),
        "what": ("Tell me what you see.", "Tell me what is in the picture."),
        "describe": ("Tell me about the picture.",),
    },
    "polite": {
        "is_there": ("Can you tell me if there is {a}?",),
        "color_of": ("Can you tell me the color of the {x}?", "Could you tell me what color the {x} is?"),
        "count_all": ("Can you count the objects?", "Please tell me the number of objects."),
        "count_color": ("Can you count the {x} objects?", "Please tell me the number of {x} objects."),
        "count_shape": ("Can you count the {x}?", "Please count the {x}.", "Could you tell me the number of {x}?"),
        "place": ("Can you tell me where the {x} is?",),
        "what": ("Can you tell me what is in the picture?",),
        "describe": ("Please describe the picture.", "Can you describe this image?", "Could you describe the picture?"),
    },
    BRITISH: {
        "color_of": ("What colour is the {x}?", "What is the colour of the {x}?", "Tell me the colour of the {x}."),
        "anything": ("Is there anything of the colour {x}?",),
        "count_color": ("How many objects have the colour {x}?",),
    },
    TYPED: {},
    "wonder": {
        "is_there": ("I wonder if there is {a}.",),
        "color_of": ("I wonder what color the {x} is.",),
        "count_all": ("I wonder how many objects there are.",),
        "count_color": ("I wonder how many {x} objects there are.",),
        "count_shape": ("I wonder how many {x} there are.",),
        "place": ("I wonder where the {x} is.",),
    },
    "number": {
        "count_all": ("What is the number of objects?", "Give me the number of objects."),
        "count_color": ("What is the number of {x} objects?",),
        "count_shape": ("What is the number of {x}?", "Give me the number of {x}."),
    },
    "which": {
        "is_there": ("Any chance there is {a} here?",),
        "color_of": ("Which color does the {x} have?", "Name the color of the {x}."),
        "place": ("Where can I find the {x}?",),
    },
    "say": {
        "is_there": ("Say whether there is {a}.",),
        "color_of": ("Say what color the {x} is.",),
        "count_shape": ("Say how many {x} there are.",),
        "relative": ("Say where the {x} is relative to the {y}.",),
        "place": ("Say where the {x} is.",),
        "what": ("Say what you see.",),
    },
}
HELD_OUT = frozenset({"show", "need", "would_you", "thanks", "other_verbs", "wonder", "number", "which", "say"})
"""Kinds of requests and questions that never occur in training."""
REQUEST_KINDS = (CAPTION, *REQUESTS)
QUESTION_KINDS = (CAPTION, *QUESTIONS)  # "caption" leaves the question as it is

SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("disc",),
    "square": ("block",),
    "ring": ("donut",),
    "cross": ("plus sign",),
    "purple": ("violet",),
    "gray": ("grey",),
    "cream": ("beige",),
}
SYNONYM_SHARE = 0.15  # of the words above, in training
UNSEEN_WORDS = {"ring": "hoop", "diamond": "rhombus", "square": "box", "cream": "ivory"}
"""Synonyms that never occur in training: only a language model that knows English can know them."""


def kinds(table: Sequence[str], split: Split | None = None) -> tuple[str, ...]:
    """Return the kinds of REQUEST_KINDS or QUESTION_KINDS that a split uses; None: all."""
    return tuple(kind for kind in table if split is None or (kind in HELD_OUT) == (split == "test"))


def sample_request(rng: np.random.Generator, kind: str | None = None, *, split: Split = "train") -> tuple[str, Prompt]:
    """Sample a prompt of `split` in the wording of `kind` (None: any trained kind); return the kind and the prompt.

    The texts of trained kinds too are split by their hash: a fifth of them never occurs in training.
    """
    while True:
        name = kind or str(rng.choice(kinds(REQUEST_KINDS, "train")))
        prompt = reworded(rng, sample_prompt(rng, split=split), name)
        if prompt is not None and (split_of(prompt.prompt) == split):
            return name, prompt


def reworded(rng: np.random.Generator, prompt: Prompt, kind: str) -> Prompt | None:
    """Return the prompt in a wording of `kind`; None if the kind has none for it."""
    if kind == CAPTION:
        return prompt
    text = request_text(rng, _slots(rng, prompt), kind)
    if text is None:
        return None
    return replace(prompt, prompt=in_other_words(rng, text, british=kind == BRITISH))


def request_text(rng: np.random.Generator, slots: Mapping[str, str], kind: str) -> str | None:
    """Fill the slots into a request of `kind`; None if no request of the kind uses exactly these slots."""
    if kind == TYPED:
        other = str(rng.choice([each for each in kinds(tuple(REQUESTS), "train") if each not in (TYPED, "list")]))
        text = request_text(rng, slots, other)
        return None if text is None else typed(text)
    named = bool(slots["tone"])
    fitting = [form for form in REQUESTS[kind] if _fits(form, named)]
    if not fitting:
        return None
    text = fitting[int(rng.integers(len(fitting)))].format_map(slots)
    capital = text[0].islower() and rng.random() < 0.5
    text = text[0].upper() + text[1:] if capital else text
    return re.sub(r"(?<=[.] )[a-z]", lambda match: match[0].upper(), text)


def _fits(form: str, named: bool) -> bool:
    """Return whether a form names the background if and only if one is given."""
    return any(slot in form for slot in ("{on}", "{comma}", "{tone}")) if named else "{tone}" not in form


def _slots(rng: np.random.Generator, prompt: Prompt) -> dict[str, str]:
    rules = prompt.include
    digits, one = rng.random() < 0.3, rng.random() < 0.15
    named = [_noun(rule, digits=False, article=with_article) for rule in rules]
    bare = [_noun(rule, digits=digits, article=(lambda noun: f"one {noun}") if one else str) for rule in rules]
    tone = prompt.background or ""
    slots = {"tone": tone, "on": f" on {with_article(tone)} background" if tone else ""}
    slots["comma"] = f", {tone} background" if tone else ""
    if "position" in rules[-1]:
        relation = str(rules[-1]["position"][0])
        if relation in ("left of", "right of") and rng.random() < 0.5:
            relation = f"to the {relation}"
        whole, short = (f"{parts[1]} {relation} {parts[0]}" for parts in (named, bare))
        return slots | {"a": whole, "bare": short, "list": short}
    return slots | {"a": enumeration(named), "bare": enumeration(bare), "list": ", ".join(bare)}


def _noun(rule: Mapping[str, Any], *, digits: bool, article: Any) -> str:
    noun = " ".join(filter(None, (rule.get("color"), rule["class"])))
    count = rule["count"]
    return article(noun) if count == 1 else f"{count if digits else NUMBERS[count]} {plural(noun)}"


def sample_unknown_request(rng: np.random.Generator, things: Sequence[str] = THINGS, *, split: Split = "train") -> str:
    """Sample a request for something that the world does not hold."""
    thing = str(rng.choice(list(things)))
    if rng.random() < 0.3:
        thing = f"{rng.choice(list(COLORS))} {thing}"
    parts = [with_article(thing)]
    if rng.random() < 0.3:
        parts.insert(int(rng.integers(2)), with_article(f"{rng.choice(list(COLORS))} {rng.choice(list(SHAPES))}"))
    bare = [part.split(" ", 1)[1] for part in parts]
    tone = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.2 else ""
    slots = {"a": enumeration(parts), "bare": enumeration(bare), "list": ", ".join(bare), "tone": tone}
    slots |= {
        "on": f" on {with_article(tone)} background" if tone else "",
        "comma": f", {tone} background" if tone else "",
    }
    while True:
        text = request_text(rng, slots, str(rng.choice(kinds(tuple(REQUESTS), split))))
        if text is not None:
            return text


def sample_wording(rng: np.random.Generator, turn: Turn) -> Turn:
    """Return the question in a wording of any trained kind."""
    while True:
        worded = reworded_question(rng, turn, str(rng.choice(kinds(QUESTION_KINDS, "train"))))
        if worded is not None:
            return worded


def reworded_question(rng: np.random.Generator, turn: Turn, kind: str) -> Turn | None:
    """Return the question in a wording of `kind`, with the same answer; None if the kind has none for it."""
    if kind == CAPTION or not turn.form:
        return turn if kind == CAPTION else None
    if kind == TYPED:
        others = [each for each in kinds(QUESTION_KINDS, "train") if each not in (TYPED, BRITISH)]
        turned = reworded_question(rng, turn, str(rng.choice(others)))
        return replace(turned or turn, question=typed((turned or turn).question))
    forms = QUESTIONS[kind].get(turn.form, ())
    if not forms:
        return None
    text = forms[int(rng.integers(len(forms)))].format(**dict(zip("xy", turn.about, strict=False)), a=_article(turn))
    return replace(turn, question=in_other_words(rng, text, british=kind == BRITISH))


def _article(turn: Turn) -> str:
    return with_article(turn.about[0]) if turn.form == "is_there" else ""


def in_other_words(rng: np.random.Generator, text: str, *, british: bool = False) -> str:
    """Replace a share of the words of SYNONYMS, in singular or plural; `british` always writes grey."""
    for word, others in SYNONYMS.items():
        share = 1.0 if british and word == "gray" else SYNONYM_SHARE
        if rng.random() < share:
            text = with_word(text, word, others[int(rng.integers(len(others)))])
    return text


def with_word(text: str, word: str, other: str) -> str:
    """Replace every `word` of the text by another one, plurals and articles included."""
    plural_of = f"{other}es" if other[-1] == "x" else plural(other)
    text = re.sub(rf"\b{plural(word)}\b", plural_of, text)
    text = re.sub(rf"\b(an?) {word}\b", lambda match: with_article(other), text)
    text = re.sub(rf"\b(An?) {word}\b", lambda match: with_article(other).capitalize(), text)
    text = re.sub(rf"\b{word.capitalize()}\b", other.capitalize(), text)
    return re.sub(rf"\b{word}\b", other, text)


def typed(text: str) -> str:
    """Return the text as it is typed in a hurry: no capitals, no punctuation."""
    return re.sub(r"[.,:?!']", "", text).lower()
