"""What clients get wrong is answered with the right 4xx, in OpenAI's shape, in one sentence; the server lives on."""

import base64
import http.client
import io
import json
import re
import struct
import urllib.error
import urllib.request
import zlib
from typing import Any

import pytest
from PIL import Image

from tests.serving.clients import data_url, file_of
from tests.serving.conftest import Served

CHAT, DRAW, EDIT, RESPOND = "chat/completions", "images/generations", "images/edits", "responses"


def post(served: Served, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """Post a body, JSON unless it is bytes; return the status and the JSON answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(f"{served.url}/v1/{path}", data, given)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def said(*content: Any, **fields: Any) -> dict[str, Any]:
    """Return a chat body with one message."""
    return {"messages": [{"role": "user", "content": content[0] if len(content) == 1 else list(content)}], **fields}


def shown(url: Any) -> dict[str, Any]:
    """Return a chat body with one image."""
    return said({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"})


def bomb(width: int, height: int) -> str:
    """Return a PNG of a few bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


RED = data_url(Image.new("RGB", (20, 12), "red"))
EPS = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n").decode()
BAD: list[tuple[str, Any, int, str]] = [
    (CHAT, b"{", 400, "not valid JSON"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "body|JSON"),
    (CHAT, b"[" * 100_000, 400, "body|JSON"),
    (CHAT, b'{"messages": ' + b"9" * 5000 + b"}", 400, "body|messages"),
    (CHAT, b"", 400, "."),
    (CHAT, [], 400, "."),
    (CHAT, {}, 400, "messages: this field is missing"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}]},
        400,
        "role of a turn",
    ),
    (CHAT, said({"type": "video", "text": "x"}, {"type": "text", "text": "x"}), 400, "messages.0.content"),
    (CHAT, said("x", temperature="hot"), 400, "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "temperature"),
    (CHAT, said("x", temperature=-1), 400, "temperature"),
    (CHAT, said("x", top_p=0), 400, "top_p"),
    (CHAT, said("x", n=11), 400, "n is 11 and the server takes 10"),
    (CHAT, said("x", n=0), 400, "n:"),
    (CHAT, said("x", max_tokens=0), 400, "max_tokens"),
    (CHAT, said("x", seed=2**70), 400, "seed"),
    (CHAT, said("x", stop=[""]), 400, "stop"),
    (CHAT, said("\ud800"), 400, "half a character"),
    (CHAT, said("x", model="\udfff"), 400, "model: "),
    (CHAT, said("x" * 300), 400, "the model reads 256"),
    (CHAT, said("x" * 40_000), 400, "40000 characters and the server takes 32000"),
    (CHAT, said(*[{"type": "image_url", "image_url": RED}] * 17, {"type": "text", "text": "?"}), 400, "17 images"),
    (CHAT, shown("/etc/passwd"), 400, "data URL"),
    (CHAT, shown("file:///etc/passwd"), 400, "data URL"),
    (CHAT, shown("http://127.0.0.1:1/a.png"), 400, "not fetched from URLs"),
    (CHAT, shown("data:image/png,abc"), 400, "base64"),
    (CHAT, shown("data:image/png;base64,!!!!"), 400, "cut off or damaged"),
    (CHAT, shown("data:image/png;base64,"), 400, "empty"),
    (CHAT, shown("data:text/html;base64," + base64.b64encode(b"<html>").decode()), 400, "web page"),
    (CHAT, shown("data:image/eps;base64," + EPS), 400, "not an image in a known format"),
    (CHAT, shown(RED[: len(RED) // 2 // 4 * 4]), 400, "cut off or damaged"),
    (CHAT, shown(bomb(101, 100)), 400, "101 x 100 pixels and the server takes 10000"),
    (CHAT, shown(bomb(60_000, 60_000)), 400, "pixels"),
    (CHAT, shown(bomb(90, 100)), 400, "cut off or damaged"),
    (CHAT, {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": RED}]}]}, 400, "system"),
    (CHAT, said("x", modalities=["image"], guidance_scale=0.5), 400, "guidance_scale is 0.5"),
    (CHAT, said(" ", modalities=["image"]), 400, "prompt is empty"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}], "modalities": ["image"]}, 400, "no message of a user"),
    (DRAW, {}, 400, "prompt: this field is missing"),
    (DRAW, {"prompt": 5}, 400, "prompt"),
    (DRAW, {"prompt": ""}, 400, "prompt is empty"),
    (DRAW, {"prompt": "x" * 240}, 400, "the model reads 256"),
    (DRAW, {"prompt": "x", "negative_prompt": "x" * 240}, 400, "the model reads 256"),
    (DRAW, {"prompt": "x", "negative_prompt": "\ud800"}, 400, "half a character"),
    (DRAW, {"prompt": "x", "size": "1024x1024"}, 400, "size is '1024x1024' and this model draws 16x16"),
    (DRAW, {"prompt": "x", "size": "big"}, 400, "size is 'big'"),
    (DRAW, {"prompt": "x", "n": 99}, 400, "n is 99"),
    (DRAW, {"prompt": "x", "n": 2, "temperature": 0}, 400, "temperature 0 would be equal"),
    (DRAW, {"prompt": "x", "partial_images": 4, "stream": True}, 400, "partial_images"),
    (DRAW, {"prompt": "x", "partial_images": 1}, 400, "stream is off"),
    (DRAW, {"prompt": "x", "response_format": "url"}, 400, "keeps no images"),
    (DRAW, {"prompt": "x", "output_format": "gif"}, 400, "output_format"),
    (DRAW, {"prompt": "x", "background": "transparent"}, 400, "background"),
    (DRAW, {"prompt": "x", "negative_prompt": "y", "guidance_scale": 1e9}, 400, "guidance_scale"),
    (DRAW, {"prompt": "x", "min_p": 1.5}, 400, "min_p"),
    (DRAW, {"prompt": "x", "guidance_schedule": "wild"}, 400, "guidance_schedule"),
    (DRAW, {"prompt": "x", "guidance_interval": [9, 2]}, 400, "guidance_interval"),
    (EDIT, {"prompt": "x"}, 400, "missing"),
    (RESPOND, {"input": []}, 400, "input"),
    (RESPOND, {"input": [{"type": "function_call_output", "output": "x"}]}, 400, "input"),
    (RESPOND, {"input": "x", "tools": [{"type": "image_generation", "action": "edit"}]}, 400, "no image to edit"),
    (RESPOND, {"input": [{"type": "image_generation_call", "result": "x"}]}, 400, "base64|damaged"),
    ("nothing", {}, 404, "Not Found"),
    ("models", {}, 405, "Method Not Allowed"),
    (CHAT, said("x" * 250_000), 413, "takes 200000 bytes"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD, ids=[f"{n}-{row[3]}" for n, row in enumerate(BAD)])
def test_bad_input_is_answered_in_one_sentence(
    tiny_served: Served, path: str, body: Any, status: int, message: str
) -> None:
    found, answer = post(tiny_served, path, body)
    assert found == status, answer
    error = answer["error"]
    assert set(answer) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert re.search(message, error["message"]), error
    assert "Traceback" not in error["message"] and "\n" not in error["message"] and len(error["message"]) < 501
    assert post(tiny_served, CHAT, said("hi", max_tokens=1))[0] == 200


def test_a_body_of_unknown_length_is_cut_off(tiny_served: Served) -> None:
    connection = http.client.HTTPConnection(tiny_served.url.removeprefix("http://"), timeout=60)
    chunks = (b'{"prompt": "', *[b"x" * 10_000] * 30, b'"}')
    headers = {"Content-Type": "application/json"}
    connection.request("POST", f"/v1/{DRAW}", iter(chunks), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413 and "takes 200000 bytes" in json.loads(answer.read())["error"]["message"]


def test_broken_forms_are_refused(tiny_served: Served) -> None:
    upload = file_of(Image.new("RGB", (20, 12)))

    def form(*fields: tuple[str, bytes], end: bytes = b"--X--\r\n") -> bytes:
        parts = [b"--X\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (n.encode(), v) for n, v in fields]
        return b"".join(parts) + end

    kind = "multipart/form-data; boundary=X"
    image, prompt = ('name="image"; filename="../../etc/passwd"', upload), ('name="prompt"', b"x")
    for body, content_type, status in (
        (form(image, prompt), kind, 200),
        (form(image), kind, 400),
        (form(prompt), kind, 400),
        (form(('name="image"', b"text"), prompt), kind, 400),
        (form(image, prompt), "multipart/form-data", 400),
        (b"\0\1\2", kind, 400),
        (form(image, prompt, ('name="n"', b"many")), kind, 400),
        (form(image, prompt, *[(f'name="f{n}"', b"x") for n in range(100)]), kind, 400),
        (form(*[image] * 40, prompt), kind, 400),
        (form(image, ('name="prompt"', b"x" * 150_000)), kind, 400),
        (form(image, ('name="prompt"', b"\xff\xfe")), kind, 200),
    ):
        found, answer = post(tiny_served, EDIT, body, Content_Type=content_type)
        assert found == status, (body[:80], answer)
        assert status == 200 or set(answer) == {"error"}


def test_a_model_that_cannot_draw_says_so() -> None:
    from tests.mllm import tiny
    from tests.serving.conftest import serve
    from unimm.serving.engine import Engine
    from unimm.serving.settings import ServingSettings

    for served in serve(Engine(*tiny.unified(context=16)), ServingSettings()):
        status, answer = post(served, DRAW, {"prompt": "x"})
        assert status == 400 and "does not draw" in answer["error"]["message"]


def test_animations_and_odd_modes_are_read(tiny_served: Served) -> None:
    frames = [Image.new("P", (9, 9), n) for n in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    url = f"data:image/gif;base64,{base64.b64encode(file.getvalue()).decode()}"
    for each in (url, data_url(Image.new("I;16", (9, 9), 40_000)), data_url(Image.new("CMYK", (9, 9)), "jpeg")):
        assert post(tiny_served, CHAT, {**shown(each), "max_tokens": 1})[0] == 200
    for name in ("webp", "bmp", "tiff"):
        url = data_url(Image.new("RGB", (9, 9)), name)
        assert post(tiny_served, CHAT, {**shown(url), "max_tokens": 1})[0] == 200
