"""Chat completions through OpenAI's client, held against `ChatSession` on the same model."""

from typing import Any

import openai
import pytest

from tests.serving.clients import about, data_url, image_of, scene
from tests.serving.conftest import Served
from unimm.chat import ChatSession

QUESTION = "what color is the shape?"


def test_an_answer_about_an_image_is_the_sessions(served: Served, parts: tuple[Any, Any]) -> None:
    image = scene()
    session = ChatSession(*parts)
    expected = session.ask(QUESTION, image), session.ask("how many shapes are there?")
    messages: list[Any] = [about(image, QUESTION)]
    first = served.client.chat.completions.create(model="any", messages=messages)
    messages += [first.choices[0].message.to_dict(), {"role": "user", "content": "how many shapes are there?"}]
    second = served.client.chat.completions.create(model="any", messages=messages)
    assert (first.choices[0].message.content, second.choices[0].message.content) == expected
    assert first.model == "any" and first.choices[0].finish_reason == "stop" and first.usage is not None
    assert first.usage.prompt_tokens == session.processor.count_tokens(session.messages[:1])
    assert 0 < first.usage.completion_tokens == first.usage.total_tokens - first.usage.prompt_tokens


def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    messages: Any = [about(scene(), "describe the picture")]
    whole = served.client.chat.completions.create(model="m", messages=messages)
    stream = list(
        served.client.chat.completions.create(
            model="m", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and sum(map(bool, pieces)) > 2
    assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == "stop"
    assert stream[-1].usage == whole.usage and stream[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("stream", [False, True])
def test_length_and_stop_end_an_answer(served: Served, stream: bool) -> None:
    messages: Any = [about(scene(), "describe the picture")]

    def ask(**options: Any) -> tuple[str, str | None]:
        answer: Any = served.client.chat.completions.create(model="m", messages=messages, stream=stream, **options)
        if not stream:
            return answer.choices[0].message.content, answer.choices[0].finish_reason
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, chunks[-1].choices[0].finish_reason

    whole, reason = ask()
    assert reason == "stop" and len(whole.split()) > 3
    short, reason = ask(max_tokens=2)
    assert whole.startswith(short) and len(short) < len(whole) and reason == "length"
    assert ask(max_completion_tokens=2) == (short, "length")
    word = whole.split()[2]
    assert ask(stop=["never said", word]) == (whole[: whole.index(word)], "stop")


def test_sampled_answers_depend_on_the_seed_alone(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "Describe this picture."}]

    def ask(n: int, seed: int) -> list[str]:
        answer = served.client.chat.completions.create(
            model="m", messages=messages, n=n, seed=seed, temperature=2.0, max_tokens=12
        )
        return [choice.message.content or "" for choice in answer.choices]

    four = ask(4, 1)
    assert len(set(four)) == 4 and ask(2, 1) == four[:2] and ask(4, 2) != four


@pytest.mark.parametrize("stream", [False, True])
def test_a_drawn_image_is_the_sessions(served: Served, parts: tuple[Any, Any], stream: bool) -> None:
    expected = ChatSession(*parts).draw("a red circle", seed=5, guidance_scale=3.0)[0]
    answer: Any = served.client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "a red circle"}],
        modalities=["text", "image"],  # type: ignore[list-item]
        seed=5,
        stream=stream,
        extra_body={"guidance_scale": 3.0},
    )
    if stream:
        (images,) = [chunk.choices[0].delta.images for chunk in answer if hasattr(chunk.choices[0].delta, "images")]
    else:
        images = answer.choices[0].message.images
    assert [image["type"] for image in images] == ["image_url"]
    assert images[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert image_of(images[0]["image_url"]["url"]).tobytes() == expected.tobytes()


def test_draw_in_the_text_draws_and_the_drawing_can_be_asked_about(served: Served, parts: tuple[Any, Any]) -> None:
    session = ChatSession(*parts)
    session.draw("a blue square", seed=3)
    expected = session.ask(QUESTION)
    messages: list[Any] = [{"role": "user", "content": "/draw a blue square"}]
    drawn = served.client.chat.completions.create(model="m", messages=messages, seed=3)
    messages[0]["content"] = "a blue square"  # what the session remembers
    messages += [drawn.choices[0].message.to_dict(), {"role": "user", "content": QUESTION}]
    answer = served.client.chat.completions.create(model="m", messages=messages)
    assert answer.choices[0].message.content == expected


def test_system_messages_and_unknown_fields(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    answer = served.client.chat.completions.create(
        model="gpt-5",
        messages=[
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        ],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        logprobs=True,
        user="somebody",
        max_tokens=4,
    )
    assert answer.choices[0].message.content is not None
    assert "'logprobs', 'tools', 'user'" in caplog.text


def test_a_failure_within_a_stream_is_an_error_of_the_client(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**arguments: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(served.engine.model, "generate", broken, raising=False)
    with pytest.raises(openai.APIError, match="failed at this request") as failed:
        list(served.client.chat.completions.create(model="m", messages=[about(scene(), "?")], stream=True))  # type: ignore[list-item]
    assert "secret" not in str(failed.value)
    monkeypatch.undo()
    url = data_url(scene())
    ok: Any = {"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "what?"}]}
    assert served.client.chat.completions.create(model="m", messages=[ok]).choices[0].message.content
