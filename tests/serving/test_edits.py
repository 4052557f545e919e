"""Edits through OpenAI's client, held against `ChatSession.edit` with the same seed."""

from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving.clients import about, data_url, file_of, image_of, scene
from tests.serving.conftest import Served
from unimm.chat import ChatSession

PROMPT = "make it blue"
LEFT = np.repeat([[True] * 4 + [False] * 4], 8, axis=0)


def mask(kind: str) -> Image.Image:
    """Return a mask of the image's left half, white or (as OpenAI's) transparent on a white image."""
    white = np.repeat(np.repeat(LEFT, 8, 0), 8, 1)
    if kind == "white":
        return Image.fromarray(np.where(white, 255, 0).astype(np.uint8))
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[white, 3] = 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["white", "transparent", None])
def test_an_edit_is_the_sessions(served: Served, parts: tuple[Any, Any], kind: str | None) -> None:
    cells = None if kind is None else LEFT
    expected = ChatSession(*parts).edit(PROMPT, scene(), cells, num_images=2, seed=8, temperature=1.0)
    more = {} if kind is None else {"mask": ("mask.png", file_of(mask(kind)))}
    answer = served.client.images.edit(
        image=("a.png", file_of(scene())), prompt=PROMPT, n=2, extra_body={"seed": 8, "temperature": 1.0}, **more
    )
    images = [image_of(each.b64_json or "") for each in answer.data or []]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert images[0].tobytes() != images[1].tobytes()


def test_an_edit_streams(served: Served) -> None:
    whole: Any = served.client.images.edit(image=[file_of(scene())], prompt=PROMPT, extra_body={"seed": 1})
    stream = served.client.images.edit(
        image=[file_of(scene())], prompt=PROMPT, extra_body={"seed": 1}, stream=True, partial_images=2
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert events[-1].b64_json == whole.data[0].b64_json


def test_a_chat_and_a_response_edit_the_image_of_the_message(served: Served, parts: tuple[Any, Any]) -> None:
    (expected,) = ChatSession(*parts).edit(PROMPT, scene(), seed=2)
    chat: Any = served.client.chat.completions.create(
        model="m",
        messages=[about(scene(), PROMPT)],  # type: ignore[list-item]
        modalities=["image"],  # type: ignore[list-item]
        seed=2,
    )
    url = chat.choices[0].message.images[0]["image_url"]["url"]
    assert image_of(url).tobytes() == expected.tobytes()
    tools: Any = [{"type": "image_generation"}]
    turn = [{"type": "input_image", "image_url": data_url(scene())}, {"type": "input_text", "text": PROMPT}]
    items: Any = [{"role": "user", "content": turn}]
    drawn: Any = served.client.responses.create(model="m", input=items, tools=tools, extra_body={"seed": 2})
    assert image_of(drawn.output[0].result).tobytes() == expected.tobytes()


def test_a_response_edits_the_last_image_with_a_mask(served: Served, parts: tuple[Any, Any]) -> None:
    (expected,) = ChatSession(*parts).edit(PROMPT, scene(), LEFT, seed=2)
    tool = {"type": "image_generation", "action": "edit", "input_image_mask": {"image_url": data_url(mask("white"))}}
    items: Any = [
        {"role": "user", "content": [{"type": "input_image", "image_url": data_url(scene())}]},
        {"role": "assistant", "content": "nice"},
        {"role": "user", "content": PROMPT},
    ]
    tools: Any = [tool]
    drawn: Any = served.client.responses.create(model="m", input=items, tools=tools, extra_body={"seed": 2})
    assert image_of(drawn.output[0].result).tobytes() == expected.tobytes()


def test_bad_uploads_are_refused(served: Served) -> None:
    upload = file_of(scene())
    edit: Any = served.client.images.edit
    for options, message in (
        ({"image": [upload, upload]}, "2 images and this model edits 1"),
        ({"image": b"not an image"}, "not an image in a known format"),
        ({"image": upload, "mask": upload[:200]}, "cut off or damaged"),
        ({"image": upload, "mask": file_of(Image.new("L", (9, 9)))}, "redraws 0 of 64"),
        ({"image": upload, "size": "1024x1024"}, "draws 64x64"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            edit(prompt=PROMPT, **options)


def test_a_checkpoints_settings_for_edits_are_those_of_edits_alone(
    served: Served, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts[0].generation_config, "image_editing", {"guidance_scale": 1.0}, raising=False)
    (edited,) = ChatSession(*parts).edit(PROMPT, scene(), seed=2)
    assert edited.tobytes() == ChatSession(*parts).edit(PROMPT, scene(), seed=2, guidance_scale=1.0)[0].tobytes()
    answer: Any = served.client.images.edit(image=file_of(scene()), prompt=PROMPT, extra_body={"seed": 2})
    assert image_of(answer.data[0].b64_json).tobytes() == edited.tobytes()
    answer = served.client.images.generate(prompt="a red circle", extra_body={"seed": 2})
    scale = parts[0].generation_config.image_generation["guidance_scale"]
    (drawn,) = ChatSession(*parts).draw("a red circle", seed=2, guidance_scale=scale)
    assert image_of(answer.data[0].b64_json).tobytes() == drawn.tobytes()


@pytest.mark.slow
def test_a_checkpoints_image_scale_is_that_of_edits_alone(
    served: Served, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the images without instructions, and drawings without an image have none."""
    config = parts[0].generation_config
    (plain,) = ChatSession(*parts).edit(PROMPT, scene(), seed=2)
    stored = {**(config.image_generation or {}), "guidance_scale": 3.0, "image_guidance_scale": 2.0}
    monkeypatch.setattr(config, "image_generation", stored)
    monkeypatch.setattr(config, "image_editing", None)
    session = ChatSession(*parts)
    (edited,) = session.edit(PROMPT, scene(), seed=2)
    (drawn,) = session.draw("a red circle", seed=2)
    answer: Any = served.client.images.edit(image=file_of(scene()), prompt=PROMPT, extra_body={"seed": 2})
    assert image_of(answer.data[0].b64_json).tobytes() == edited.tobytes() != plain.tobytes()
    answer = served.client.images.generate(prompt="a red circle", extra_body={"seed": 2})
    assert image_of(answer.data[0].b64_json).tobytes() == drawn.tobytes()
