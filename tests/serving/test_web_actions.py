"""What the page's buttons do, without a browser: equal to the Python API, within the server's limits, one sentence for
an error, and no file or address of a request ever opened."""

import asyncio
import base64
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unimm
from tests.mllm import tiny
from tests.serving.clients import file_of, scene
from unimm.cli import main
from unimm.serving.app import create_app
from unimm.serving.engine import Engine
from unimm.serving.run import serving
from unimm.serving.service import Service
from unimm.serving.settings import ServingSettings

gr = pytest.importorskip("gradio")
from unimm.serving import web_actions  # noqa: E402
from unimm.serving.web import OTHER_LIMITS, build_page, mount_page  # noqa: E402
from unimm.serving.web_actions import DESCRIBE, INSTRUCT, Actions, Talk, code_map, mask_of  # noqa: E402


@pytest.fixture(scope="module")
def tiny_parts() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return tiny.unified()


@pytest.fixture(scope="module")
def engine(tiny_parts: tuple[Any, Any]) -> Iterator[Engine]:
    engine = Engine(*tiny_parts)
    yield engine
    engine.close()


@pytest.fixture
def actions(engine: Engine) -> Actions:
    return Actions(Service(engine, ServingSettings(max_image_pixels=10_000, max_n=4)))


def all_of(steps: AsyncIterator[Any]) -> list[Any]:
    async def collect() -> list[Any]:
        return [step async for step in steps]

    return asyncio.run(collect())


def painted(image: Image.Image, box: tuple[int, int, int, int] | None) -> dict[str, Any]:
    """What the editor sends: an image, and a layer that is transparent but for a box."""
    layer = Image.new("RGBA", image.size, (244, 63, 94, 0))
    if box is not None:
        layer.paste((244, 63, 94, 255), box)
    return {"background": file_of(image), "layers": [file_of(layer)]}


def test_drawing_grows_and_ends_with_the_images_of_the_session(tiny_parts: tuple[Any, Any], actions: Actions) -> None:
    steps = all_of(actions.draw("a red circle", "2", "7", 2.0, 0.8))
    rows = tiny_parts[0].config.image_grid[0]
    assert len(steps) == rows and all(len(images) == 2 for images, _ in steps)
    assert steps[0][0][0].tobytes() != steps[-1][0][0].tobytes()
    expected = unimm.ChatSession(*tiny_parts).draw(
        "a red circle", num_images=2, seed=7, guidance_scale=2.0, temperature=0.8
    )
    assert [image.tobytes() for image in steps[-1][0]] == [image.tobytes() for image in expected]
    assert steps[-1][1].startswith("Seed 7 ")


def test_editing_by_an_instruction_is_that_of_the_session(tiny_parts: tuple[Any, Any], actions: Actions) -> None:
    image = scene()
    half = (0, 0, image.width // 2, image.height)
    (*_, (images, _)) = all_of(actions.edit(painted(image, half), "make it blue", INSTRUCT, "3", 2.0, 0.8))
    mask = Image.new("L", image.size)
    mask.paste(255, half)
    expected = unimm.ChatSession(*tiny_parts).edit(
        "make it blue", image, mask, seed=3, guidance_scale=2.0, temperature=0.8
    )
    assert images[0].tobytes() == expected[0].tobytes()


def test_a_description_conditions_on_the_text_alone_and_keeps_what_is_not_painted(
    tiny_parts: tuple[Any, Any], actions: Actions
) -> None:
    model, processor = tiny_parts
    image = scene()
    painting = painted(image, (0, 0, image.width, image.height))
    (*_, (images, _)) = all_of(actions.edit(painting, "a red circle", DESCRIBE, "3", 2.0, 0.8))
    drawn = unimm.ChatSession(model, processor).draw("a red circle", seed=3, guidance_scale=2.0, temperature=0.8)
    assert images[0].tobytes() == drawn[0].tobytes()  # everything painted: nothing of the image is left

    height, width = model.config.image_grid
    request = asyncio.run(
        actions.service.draw_request(
            "a red circle", web_actions._drawing("3", 2.0, 0.8), image=image, reads_image=False, mask=_lower(image)
        )
    )
    assert request.messages[0]["content"] == [{"type": "text", "text": "a red circle"}]
    assert request.redrawn is not None and request.redrawn[-1].all() and not request.redrawn[: height // 2].any()
    assert request.redrawn.shape == (height, width)


def _lower(image: Image.Image) -> Image.Image:
    mask = Image.new("L", image.size)
    mask.paste(255, (0, image.height // 2, image.width, image.height))
    return mask


def test_chat_draws_and_answers_as_the_session_does(
    tiny_parts: tuple[Any, Any], actions: Actions, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    scene().save(path)
    (*_, (_, _, talk)) = all_of(actions.chat({"text": "Draw a circle", "files": []}, Talk()))
    assert [turn["role"] for turn in talk.messages] == ["user", "assistant"]
    assert talk.messages[1]["content"][0]["image"].width == actions.service.image_size
    session = unimm.ChatSession(*tiny_parts)
    session.messages = list(talk.messages)
    (*_, (_, shown, talk)) = all_of(actions.chat({"text": "What?", "files": [str(path)]}, talk))
    answer = session.ask("What?", [scene()]).strip() or "(no answer)"
    assert shown[-1] == {"role": "assistant", "content": [answer]}
    assert [turn["role"] for turn in shown] == ["user", "assistant"] * 2
    assert [turn["role"] for turn in talk.messages] == [turn["role"] for turn in session.messages]


def test_a_reconstruction_is_the_tokenizers(tiny_parts: tuple[Any, Any], actions: Actions) -> None:
    model, processor = tiny_parts
    original, image, codes, line = asyncio.run(actions.reconstruct(file_of(scene())))
    pixel_values = processor.image_processor([scene()], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        ids = model.image_tokenizer.encode(pixel_values).ids
        pixels = model.image_tokenizer.decode(ids)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(image) - pixels * 255).max() <= 0.51
    assert original.size == image.size == codes.size
    used = len(set(ids.flatten().tolist()))
    assert f"**{ids.numel()}** codes" in line and f"**{used}** of them different" in line


def test_equal_codes_have_equal_colors_and_others_do_not() -> None:
    codes = np.random.default_rng(0).normal(size=(4, 8))[[[0, 1], [2, 0]]]
    cells = np.asarray(code_map(codes, (4, 4)))[::2, ::2].reshape(4, 3)
    assert (cells[0] == cells[3]).all() and len({tuple(cell) for cell in cells}) == 3
    assert len(np.unique(np.asarray(code_map(np.ones((2, 2, 5)), (2, 2))))) == 1  # nothing to tell apart


def test_all_layers_are_painted_upon() -> None:
    layers = [painted(Image.new("RGB", (8, 8)), box)["layers"][0] for box in ((0, 0, 2, 8), (6, 0, 8, 8), None)]
    mask = mask_of(layers)
    assert mask is not None and (np.asarray(mask) > 0).any(axis=0).tolist() == [True] * 2 + [False] * 4 + [True] * 2
    assert mask_of(layers[2:]) is None and mask_of([]) is None


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (lambda a: a.draw("", "1", "", 2, 1), "prompt is empty"),
        (lambda a: a.draw("a", "9", "", 2, 1), "n is 9 and the server takes 4"),
        (lambda a: a.draw("a", "1", "seven", 2, 1), "seed"),
        (lambda a: a.draw("a", "1", "", -2, 1), "guidance_scale"),
        (lambda a: a.draw("a" * 40_000, "1", "", 2, 1), "40000 characters"),
        (lambda a: a.edit({"background": None, "layers": []}, "a", DESCRIBE, "", 2, 1), "no image"),
        (lambda a: a.edit(painted(scene(), None), "a", DESCRIBE, "", 2, 1), "Nothing is painted"),
        (lambda a: a.edit(painted(Image.new("RGB", (200, 200)), None), "a", DESCRIBE, "", 2, 1), "200 x 200"),
        (lambda a: a.edit({"background": b"no image", "layers": []}, "a", DESCRIBE, "", 2, 1), "that was uploaded"),
        (lambda a: a.chat({"text": " ", "files": []}, Talk()), "There is no text"),
        (lambda a: a.chat({"text": "Draw", "files": []}, Talk()), "prompt is empty"),
    ],
)
def test_a_mistake_is_one_sentence(actions: Actions, steps: Any, sentence: str) -> None:
    with pytest.raises(gr.Error) as caught:
        all_of(steps(actions))
    assert sentence in caught.value.message and "\n" not in caught.value.message
    assert actions.service.engine.waiting == 0


def test_a_failed_message_comes_back_into_the_text_box(actions: Actions) -> None:
    async def last() -> Any:
        steps = []
        with pytest.raises(gr.Error):
            async for step in actions.chat({"text": "Draw", "files": []}, Talk()):
                steps.append(step)
        return steps[-1]

    box, shown, talk = asyncio.run(last())
    assert box["value"] == {"text": "Draw", "files": []} and shown == [] and talk == Talk()


def test_leaving_frees_the_engine(actions: Actions) -> None:
    async def leave() -> None:
        steps = actions.draw("a red circle", "1", "", 2, 1)
        await anext(steps)
        await steps.aclose()

    asyncio.run(leave())
    assert actions.service.engine.running == 0 and actions.service.engine.waiting == 0


# ---- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    app = create_app(engine, ServingSettings(api_keys=("sk-test",)), close_engine=False)
    mount_page(app, knows_shapes=True)
    with serving(app) as url:
        yield url


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, str]:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    key = base64.b64encode(b"anyone:sk-test").decode()
    headers = {"Authorization": f"Basic {key}", "Content-Type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def called(address: str, name: str, data: list[Any]) -> str:
    """Call a function of the page as gradio's client does; return the events of the answer."""
    status, text = ask(f"{address}/web/gradio_api/call/{name}", {"data": data})
    assert status == 200, text
    return ask(f"{address}/web/gradio_api/call/{name}/{json.loads(text)['event_id']}")[1]


def test_the_page_needs_the_key_as_a_password(address: str) -> None:
    assert ask(f"{address}/web/")[0] == 200 and "gradio" in ask(f"{address}/")[1]
    for wrong in (b"anyone:sk-other", b"sk-test", b"sk-test:"):
        assert ask(f"{address}/web/", Authorization=f"Basic {base64.b64encode(wrong).decode()}")[0] == 401
    assert ask(f"{address}/web/", Authorization="Basic %%%")[0] == 401
    assert ask(f"{address}/v1/models")[0] == 401  # a password is for the page alone
    assert ask(f"{address}/web/", Origin="http://other.example")[0] == 403


def test_no_path_and_no_address_of_a_request_is_opened(address: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    scene().save(secret)

    def image(path: str) -> dict[str, Any]:
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    for path in (str(secret), "/etc/hostname", "http://127.0.0.1:9/a.png", "https://example.com/a.png"):
        answer = called(address, "reconstruct", [image(path)])
        assert "event: error" in answer and "complete" not in answer, answer
        editor = {"background": image(path), "layers": [], "composite": None}
        answer = called(address, "edit", [editor, "a", DESCRIBE, "", 2, 1])
        assert "event: error" in answer and "complete" not in answer, answer
    status, _ = ask(f"{address}/web/gradio_api/file={secret}")
    assert status == 403
    uploaded = upload(address, file_of(scene()))
    assert "event: complete" in called(address, "reconstruct", [image(uploaded)])  # what is uploaded is


def upload(address: str, data: bytes) -> str:
    """Upload a file as the page does; return its path."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = head + data + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, text = ask(f"{address}/web/gradio_api/upload", body, **headers)
    assert status == 200, text
    return str(json.loads(text)[0])


def test_the_functions_of_the_page_have_names(address: str) -> None:
    names = json.loads(ask(f"{address}/web/gradio_api/info")[1])["named_endpoints"]
    assert set(names) == {"/chat", "/draw", "/edit", "/reconstruct"}
    answer = called(address, "draw", ["a red circle", "1", "7", 2, 1])
    assert "event: complete" in answer and "Seed 7" in answer


def test_nothing_of_the_page_is_elsewhere(address: str) -> None:
    page = ask(f"{address}/web/")[1]
    assert "fonts.googleapis" not in page and "fonts.gstatic" not in page
    config = json.loads(ask(f"{address}/web/config")[1])
    assert config["analytics_enabled"] is False and config["show_error"] is False


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "gradio" else find_spec(name))
    for words in (["web"], ["serve", "--web"]):
        assert main(words) == 2
        assert "(gradio): pip install unimm[web]." in capsys.readouterr().err


def test_a_page_of_another_model_promises_no_shapes(engine: Engine) -> None:
    page = build_page(Service(engine, ServingSettings()), knows_shapes=False)
    texts = json.dumps(page.get_config_file(), default=str)
    assert OTHER_LIMITS in texts and "six shapes" not in texts and "two green squares" not in texts
