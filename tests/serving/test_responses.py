"""Responses through OpenAI's client, held against `ChatSession`."""

from typing import Any

import openai
import pytest

from tests.serving.clients import data_url, image_of, scene
from tests.serving.conftest import Served
from unimm.chat import ChatSession

QUESTION = "what color is the shape?"


def asked(image: Any) -> list[Any]:
    parts = [{"type": "input_image", "image_url": data_url(image)}, {"type": "input_text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def test_text_is_the_sessions_whole_and_streamed(served: Served, parts: tuple[Any, Any]) -> None:
    expected = ChatSession(*parts).ask(QUESTION, scene())
    whole = served.client.responses.create(model="m", input=asked(scene()))
    assert whole.output_text == expected and whole.status == "completed" and whole.usage is not None
    with served.client.responses.stream(model="m", input=asked(scene())) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == expected
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") >= 1 and kinds.count("response.output_text.done") == 1


def test_instructions_are_a_system_message(served: Served) -> None:
    one = served.client.responses.create(model="m", input="hello", instructions="be brief", max_output_tokens=1)
    two = served.client.chat.completions.create(
        model="m",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        max_tokens=1,
    )
    assert one.output_text == two.choices[0].message.content and one.status == "incomplete"
    assert one.incomplete_details is not None and one.incomplete_details.reason == "max_output_tokens"


def test_the_tool_draws_and_its_image_can_be_sent_back(served: Served, parts: tuple[Any, Any]) -> None:
    session = ChatSession(*parts)
    (expected,) = session.draw("a green ring", seed=4)
    expected_answer = session.ask(QUESTION)
    tools: Any = [{"type": "image_generation", "quality": "high", "size": "auto"}]
    drawn = served.client.responses.create(model="m", input="a green ring", tools=tools, extra_body={"seed": 4})
    (call,) = drawn.output
    assert call.type == "image_generation_call" and call.status == "completed"
    assert image_of(call.result or "").tobytes() == expected.tobytes()
    turns: Any = [
        {"role": "user", "content": "a green ring"},
        call.to_dict(),
        {"role": "user", "content": QUESTION},
    ]
    answer = served.client.responses.create(model="m", input=turns, tools=tools, tool_choice="none")
    assert answer.output_text == expected_answer


def test_the_tools_stream_has_partial_images(served: Served) -> None:
    tools: Any = [{"type": "image_generation", "partial_images": 2}]
    whole: Any = served.client.responses.create(model="m", input="a red star", tools=tools, extra_body={"seed": 6})
    events = list(
        served.client.responses.create(model="m", input="a red star", tools=tools, stream=True, extra_body={"seed": 6})
    )
    kinds = [event.type.removeprefix("response.") for event in events]
    call = "image_generation_call"
    assert kinds == [
        *("created", "in_progress", "output_item.added", f"{call}.in_progress", f"{call}.generating"),
        *(f"{call}.partial_image", f"{call}.partial_image", f"{call}.completed", "output_item.done", "completed"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.response.output[0].result == whole.output[0].result


def test_nothing_is_stored(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="stores no responses"):
        served.client.responses.create(model="m", input="x", previous_response_id="resp_1")
