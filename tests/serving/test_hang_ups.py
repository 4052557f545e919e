"""Two hundred clients that hang up midway: the queue empties, memory returns, and the server lives on."""

import gc
import json
import socket
import time
from typing import Any

import numpy as np
import psutil
import pytest

from tests.serving.conftest import Served, serve
from unimm.serving.engine import Engine
from unimm.serving.settings import EngineSettings, ServingSettings

CLIENTS = 200


def bodies(number: int) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of client `number`: text and images, streamed and whole."""
    stream = number % 2 == 0
    if number % 4 < 2:
        message = {"role": "user", "content": f"what is there, {number}?"}
        return "chat/completions", {"messages": [message], "stream": stream, "max_tokens": 64, "temperature": 2.0}
    return "images/generations", {"prompt": f"a red circle {number}", "stream": stream, "n": 2}


def hang_up(port: int, number: int, seen: bool) -> None:
    """Send a request and close the connection: at once, or after the first bytes of the answer if it is a stream."""
    path, body = bodies(number)
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = [
            f"POST /v1/{path} HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
        ]
        whole = "\r\n".join([*head, "", ""]).encode() + data
        connection.sendall(whole if number % 10 else whole[: len(whole) // 2])  # some within their own request
        if seen and body["stream"] and number % 10:
            connection.recv(64)


def settled(engine: Engine) -> None:
    until = time.monotonic() + 120
    while engine.waiting or engine.running:
        assert time.monotonic() < until, (engine.waiting, engine.running)
        time.sleep(0.01)


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
def test_two_hundred_clients_hang_up(parts: tuple[Any, Any]) -> None:
    engine = Engine(*parts, EngineSettings(queue_size=CLIENTS))
    for served in serve(engine, ServingSettings()):
        port = int(served.url.rpartition(":")[2])

        def ask(served: Served = served) -> tuple[str | None, str]:
            chat = served.client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "Describe this picture."}]
            )
            image: Any = served.client.images.generate(prompt="a red circle", extra_body={"seed": 1})
            return chat.choices[0].message.content, image.data[0].b64_json

        before = ask()
        for number in range(20):  # memory pools grow with the first of them
            hang_up(port, number, seen=number % 3 == 0)
        settled(engine)
        sizes = [resident()]
        for number in range(CLIENTS):
            hang_up(port, number, seen=number % 20 == 3)
        settled(engine)
        assert ask() == before
        sizes.append(resident())
        assert not engine._waiting and sizes[1] - sizes[0] < 64 << 20, np.diff(sizes) / 2**20
