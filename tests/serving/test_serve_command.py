"""`unimm serve`: what it refuses, and how it starts and stops."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from unimm.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "there are 0 API keys"),
        (["--port", "0"], "give 1 to 65535"),
        (["--api-key-file", "missing"], "cannot be read"),
    ],
)
def test_what_is_refused(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *words]) == 2
    assert message in capfd.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve"]) == 2
    error = capfd.readouterr().err
    assert "pip install unimm[serve]" in error and error.count("\n") == 1


@pytest.mark.slow
def test_sigterm_lets_a_running_request_finish() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "unimm.cli", "serve", "--port", str(port), "--batch-wait", "1"]
    server = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            assert urllib.request.urlopen(f"{url}/health").status == 200
            break
        except urllib.error.URLError:
            assert time.monotonic() < until and server.poll() is None
            time.sleep(0.1)
    body = json.dumps({"prompt": "a red circle"}).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    head = "POST /v1/images/generations HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    time.sleep(0.3)  # it waits for a fuller batch now
    server.send_signal(signal.SIGTERM)
    answer = b""
    while chunk := connection.recv(1 << 16):
        answer += chunk
    assert b" 200 " in answer.splitlines()[0] and json.loads(answer.partition(b"\r\n\r\n")[2])["data"]
    server.wait(60)
