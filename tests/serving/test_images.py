"""Images through OpenAI's client, held against `ChatSession.draw` with the same seed."""

import urllib.request
from typing import Any

import openai
import pytest

from tests.serving.clients import image_of
from tests.serving.conftest import Served
from unimm.chat import ChatSession
from unimm.mllm.previews import DrawingStreamer
from unimm.sampling import SAMPLING_NAMES
from unimm.serving.schemas import Drawing

PROMPT = "a yellow triangle"


def test_images_are_the_sessions(served: Served, parts: tuple[Any, Any]) -> None:
    expected = ChatSession(*parts).draw(PROMPT, num_images=3, seed=7)
    answer = served.client.images.generate(model="m", prompt=PROMPT, n=3, size="auto", extra_body={"seed": 7})
    assert [image_of(each.b64_json or "").tobytes() for each in answer.data or []] == [e.tobytes() for e in expected]
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    assert answer.usage is not None and answer.usage.output_tokens == 3 * 64
    assert answer.model_extra is not None and answer.model_extra["seed"] == 7


def test_our_own_settings_arrive(served: Served, parts: tuple[Any, Any]) -> None:
    settings: dict[str, Any] = {"guidance_scale": 1.0, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
    expected = ChatSession(*parts).draw(PROMPT, seed=1, **settings)[0]
    answer = served.client.images.generate(prompt=PROMPT, size="64x64", extra_body={"seed": 1, **settings})
    assert image_of(answer.data[0].b64_json).tobytes() == expected.tobytes()  # type: ignore


@pytest.mark.slow
def test_every_sampling_setting_of_a_drawing_arrives(served: Served, parts: tuple[Any, Any]) -> None:
    plain = {"guidance_scale": 4.0, "temperature": 1.5}
    drawn = []
    for extra in ({}, {"min_p": 0.2}, {"guidance_interval": (2, 9)}, {"guidance_schedule": "linear"}):
        settings = {**plain, **extra}
        expected = ChatSession(*parts).draw(PROMPT, seed=1, **settings)[0]
        answer = served.client.images.generate(prompt=PROMPT, extra_body={"seed": 1, **settings})
        drawn.append(image_of(answer.data[0].b64_json).tobytes())  # type: ignore
        assert drawn[-1] == expected.tobytes()
    assert len(set(drawn)) == 4  # each setting changes the image
    assert set(SAMPLING_NAMES) - set(Drawing.model_fields) == {"image_guidance_scale"}


def test_a_negative_prompt_is_the_models(served: Served, parts: tuple[Any, Any]) -> None:
    import torch

    model, processor = parts
    negative = torch.tensor(processor.encode([processor.drawing_prompt("a red circle")])["input_ids"])
    prompt = torch.tensor(processor.encode([processor.drawing_prompt(PROMPT)])["input_ids"])
    ids = model.generate(prompt, generation_mode="image", seed=2, guidance_scale=4.0, negative_prompt_ids=negative)
    expected = processor.postprocess(model.decode_image_tokens(ids))[0]
    extra = {"seed": 2, "guidance_scale": 4.0, "negative_prompt": "a red circle"}
    answer = served.client.images.generate(prompt=PROMPT, extra_body=extra)
    assert image_of(answer.data[0].b64_json).tobytes() == expected.tobytes()  # type: ignore
    del extra["negative_prompt"]
    other = served.client.images.generate(prompt=PROMPT, extra_body=extra)
    assert image_of(other.data[0].b64_json).tobytes() != expected.tobytes()  # type: ignore


@pytest.mark.parametrize("count", [0, 1, 3])
def test_partial_images_come_before_the_image(served: Served, parts: tuple[Any, Any], count: int) -> None:
    model, processor = parts
    seen: dict[int, Any] = {}
    streamer = DrawingStreamer(
        model, processor, rows=1, on_image=lambda images, done, total: seen.update({done: images[0]})
    )
    prompt = torch_ids(processor)
    model.generate(prompt, generation_mode="image", seed=9, streamer=streamer)
    whole = served.client.images.generate(prompt=PROMPT, extra_body={"seed": 9}).data[0].b64_json  # type: ignore
    stream = served.client.images.generate(prompt=PROMPT, stream=True, partial_images=count, extra_body={"seed": 9})
    *partial, last = list(stream)
    assert last.type == "image_generation.completed" and last.b64_json == whole
    assert [event.type for event in partial] == ["image_generation.partial_image"] * count
    places = [round(8 * n / (count + 1)) * 8 for n in range(1, count + 1)]
    for number, (event, place) in enumerate(zip(partial, places, strict=True)):
        assert event.partial_image_index == number and event.size == "64x64"  # type: ignore[union-attr]
        assert image_of(event.b64_json).tobytes() == seen[place].tobytes()


def torch_ids(processor: Any) -> Any:
    import torch

    return torch.tensor(processor.encode([processor.drawing_prompt(PROMPT)])["input_ids"])


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_other_file_formats(served: Served, name: str) -> None:
    answer: Any = served.client.images.generate(prompt=PROMPT, output_format=name, output_compression=80)  # type: ignore
    image = image_of(answer.data[0].b64_json)
    assert image.format == name.upper() and image.size == (64, 64) and answer.output_format == name


def test_urls_lead_to_kept_images(served: Served) -> None:
    answer: Any = served.client.images.generate(prompt=PROMPT, response_format="url", n=2, extra_body={"seed": 0})
    data = served.client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 0}).data
    for kept, each in zip(answer.data, data or [], strict=True):
        import base64

        with urllib.request.urlopen(kept.url) as found:  # without a key, as browsers do
            assert found.headers["Content-Type"] == "image/png"
            assert base64.b64encode(found.read()).decode() == each.b64_json
    served.client.images.generate(prompt=PROMPT, response_format="url", n=4)
    with pytest.raises(urllib.error.HTTPError, match="404"):  # the server of this test keeps four
        urllib.request.urlopen(answer.data[0].url)


def test_without_a_store_there_are_no_urls(tiny_served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="keeps no images"):
        tiny_served.client.images.generate(prompt="x", response_format="url")
