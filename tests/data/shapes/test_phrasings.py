"""Wordings of requests and questions: what is asked stays the same, and what is held out is never trained on."""

import re

import numpy as np
import pytest

from unimm.data.conversations import ShapesConversations
from unimm.data.shapes import sample_conversation, sample_prompt
from unimm.data.shapes.phrasings import (
    BRITISH,
    CAPTION,
    HELD_OUT,
    QUESTION_KINDS,
    QUESTIONS,
    REQUEST_KINDS,
    REQUESTS,
    SYNONYMS,
    TYPED,
    UNSEEN_WORDS,
    reworded,
    reworded_question,
    sample_request,
    with_word,
)
from unimm.data.shapes.prompts import split_of
from unimm.data.shapes.things import REFUSAL, THINGS, UNSEEN_THINGS
from unimm.data.shapes.world import BACKGROUNDS, COLORS, SHAPES
from unimm.data.text_to_image import ShapesDrawings
from unimm.english import NUMBERS, plural

# Words that only held-out kinds use, written out by hand.
HELD_OUT_WORDS = {
    *(
        "show me",
        "i need",
        "would you",
        "thanks",
        "thank you",
        "sketch (?!of)",
        "produce",
        "render an",
        "i wonder",
        "what is the number",
        "give me the number",
    ),
    *(
        "which color",
        "name the color",
        "where can i find",
        "any chance",
        "say whether",
        "say what color",
        "say how many",
    ),
    *("say where", "hoop", "rhombus", "box", "ivory", *UNSEEN_THINGS),
}


def asked_in_training(index: int) -> list[str]:
    flows = (
        ShapesDrawings(3, phrasing_share=0.9),
        ShapesConversations(4, (2, 2), phrasing_share=0.9, unknown_share=0.1),
    )
    turns = [turn for flow in flows for turn in flow.messages(index) if turn["role"] == "user"]
    return [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]


def test_held_out_wordings_and_words_never_occur_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("conversations", "text_to_image"):
        monkeypatch.setattr(f"unimm.data.{module}.render", lambda scene: None)  # texts only
    texts = [text.lower() for index in range(3600) for text in asked_in_training(index)]
    assert len(texts) >= 10_000
    found = [text for text in texts if re.search(rf"\b({'|'.join(HELD_OUT_WORDS)})", text)]
    assert not found
    assert {"grey", "disc", "please", "count", "dog"} <= {
        word for text in texts for word in re.findall(r"[a-z]+", text)
    }


def test_held_out_kinds_use_the_words_that_the_test_above_looks_for() -> None:
    held_out = [form for kind in HELD_OUT for form in REQUESTS.get(kind, ())]
    held_out += [form for kind in HELD_OUT for forms in QUESTIONS.get(kind, {}).values() for form in forms]
    looked_for = re.compile("|".join([*HELD_OUT_WORDS, "^say what you see", "^render"]))
    assert [form for form in held_out if not looked_for.search(form.lower())] == []
    assert set(REQUEST_KINDS) | set(QUESTION_KINDS) > HELD_OUT


def test_a_request_asks_for_what_its_rules_say() -> None:
    """Every wording names each color, shape, number and background of the prompt, and no other."""
    rng = np.random.default_rng(0)
    back = {other: word for word, others in SYNONYMS.items() for other in others}
    for kind in REQUEST_KINDS:
        for _ in range(40):
            named, prompt = sample_request(rng, kind)
            assert named == kind and split_of(prompt.prompt) == "train"
            text = prompt.prompt.lower()
            for other, word in back.items():
                text = with_word(text, other, word)
            words = re.findall(r"[a-z0-9]+", text)
            wanted = {color for rule in prompt.include if (color := rule.get("color"))}
            assert {word for word in words if word in COLORS} == wanted, prompt
            assert {word for word in words if word in BACKGROUNDS} == {*filter(None, [prompt.background])}, prompt
            for rule in prompt.include:
                noun = rule["class"] if rule["count"] == 1 else plural(rule["class"])
                assert noun in words, prompt
                counted = {str(rule["count"]), NUMBERS[rule["count"]]} & set(words)
                assert rule["count"] == 1 or counted, prompt
                assert "position" not in rule or rule["position"][0] in text, prompt
            singular = {plural(shape): shape for shape in SHAPES}
            shapes = {singular.get(word, word) for word in words} & set(SHAPES)
            assert shapes == {rule["class"] for rule in prompt.include}, prompt


def test_the_captions_stay_among_the_wordings_and_the_default_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    prompt = sample_prompt(rng)
    assert reworded(rng, prompt, CAPTION) == prompt
    plain, worded = ShapesDrawings(5), ShapesDrawings(5, phrasing_share=0.5)
    same = [plain.messages(n)[0] == worded.messages(n)[0] for n in range(200)]
    assert 0.4 < np.mean(same) < 0.7


def test_questions_keep_their_answers_and_their_words() -> None:
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(60):
        _, turns = sample_conversation(rng)
        for turn in turns:
            for kind in QUESTION_KINDS:
                worded = reworded_question(rng, turn, kind)
                if worded is None:
                    continue
                seen.add(kind)
                assert (worded.answer, worded.kind) == (turn.answer, turn.kind)
                text = worded.question
                for word, others in SYNONYMS.items():
                    for other in others:
                        text = with_word(text, other, word)
                assert all(name.split()[-1] in text for name in turn.about), worded
                if kind == TYPED:
                    assert text == text.lower() and not re.search(r"[.,?]", text)
    assert seen == set(QUESTION_KINDS)


@pytest.mark.parametrize(
    ("text", "word", "other", "result"),
    [
        ("a square and two squares", "square", "box", "a box and two boxes"),
        ("An orange and a circle", "circle", "arc", "An orange and an arc"),
        ("two crosses. Cross", "cross", "plus sign", "two plus signs. Plus sign"),
    ],
)
def test_words_are_replaced_with_articles_and_plurals(text: str, word: str, other: str, result: str) -> None:
    assert with_word(text, word, other) == result


def test_british_requests_write_grey_and_colour() -> None:
    rng = np.random.default_rng(3)
    texts = [sample_request(rng, BRITISH)[1].prompt for _ in range(80)]
    assert not any("gray" in text.lower() or re.search(r"\bcolor\b", text) for text in texts)
    assert any("grey" in text for text in texts) and any("colour" in text for text in texts)


def test_unknown_requests_are_refused_in_text() -> None:
    flow = ShapesConversations(6, unknown_share=0.25)
    refused = [flow.messages(n) for n in range(400) if flow.messages(n)[-1]["content"][0]["text"] == REFUSAL]
    assert 65 < len(refused) < 135  # 100 +- 4 standard deviations
    for asked, _ in refused:
        assert [part["type"] for part in asked["content"]] == ["text"]
        assert re.search(rf"\b({'|'.join(THINGS)})\b", asked["content"][0]["text"].lower())
    assert not set(THINGS) & set(UNSEEN_THINGS) and not {*THINGS, *UNSEEN_THINGS} & {*SHAPES, *COLORS}
    assert not set(UNSEEN_WORDS.values()) & {other for others in SYNONYMS.values() for other in others}
