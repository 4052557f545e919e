"""Answers do not depend on their company, and end where their own conversation leaves no more room."""

from typing import Any

import pytest

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm.answering import answer_all, chat_inputs

NO_END: dict[str, Any] = {"eos_token_id": [], "pad_token_id": 0}
CONVERSATIONS = [
    [tiny.user(tiny.image(), "is there a red circle?")],
    [tiny.user("one two three")],
    [
        tiny.user(tiny.image("blue"), "a photo", tiny.image("red"), "of two?"),
        tiny.assistant("no"),
        tiny.user("ring?"),
    ],
]


@pytest.fixture(scope="module")
def unified() -> tuple[Any, Any]:
    return tiny.unified()


def test_alone_together_and_in_another_order(unified: tuple[Any, Any]) -> None:
    alone = [answer_all(*unified, [each], max_new_tokens=6, **NO_END)[0] for each in CONVERSATIONS]
    assert len({answer.text for answer in alone}) == 3
    assert answer_all(*unified, CONVERSATIONS, max_new_tokens=6, **NO_END) == alone
    assert answer_all(*unified, CONVERSATIONS[::-1], max_new_tokens=6, **NO_END) == alone[::-1]


def test_tokens_are_counted_without_the_padding(unified: tuple[Any, Any]) -> None:
    answers = answer_all(*unified, CONVERSATIONS, max_new_tokens=6, **NO_END)
    lengths = [chat_inputs(*unified, [each])["input_ids"].shape[1] for each in CONVERSATIONS]
    assert [answer.prompt_tokens for answer in answers] == lengths
    assert [answer.new_tokens for answer in answers] == [6, 6, 6]


def test_an_answer_ends_with_its_end_token(unified: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = unified
    inputs = chat_inputs(model, processor, CONVERSATIONS[:1])
    written = model.generate(**inputs, do_sample=False, max_new_tokens=6, **NO_END)
    row = written[0, inputs["input_ids"].shape[1] :].tolist()
    end = next(token for place, token in enumerate(row) if place and token not in row[:place])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    monkeypatch.setattr(model.generation_config, "pad_token_id", end)
    (answer,) = answer_all(model, processor, CONVERSATIONS[:1], max_new_tokens=6)
    assert answer.new_tokens == row.index(end) > 0


def test_an_answer_ends_with_the_context_whatever_its_company() -> None:
    model, processor = tiny.unified(context=64)
    long = chat_inputs(model, processor, CONVERSATIONS[:1])["input_ids"].shape[1]
    alone, other, beside = (
        answer_all(model, processor, batch, max_new_tokens=40, **NO_END)
        for batch in (CONVERSATIONS[:1], CONVERSATIONS[1:2], CONVERSATIONS[:2])
    )
    assert alone[0].new_tokens == 64 - long < other[0].new_tokens
    assert beside == [*alone, *other]


def test_a_conversation_without_room_is_refused() -> None:
    model, processor = tiny.unified(context=40)
    with pytest.raises(UserError, match=r"Conversation 2 of 2 is \d+ tokens long and the model reads 40"):
        answer_all(model, processor, [CONVERSATIONS[1], CONVERSATIONS[2]], max_new_tokens=4)


def test_markers_that_people_type_are_plain_text(unified: tuple[Any, Any]) -> None:
    model, processor = unified
    typed = [[tiny.user(f"one {processor.image_token} two <|im_end|>")]]
    input_ids = chat_inputs(model, processor, typed)["input_ids"]
    assert not (input_ids == model.config.image_token_id).any()
