"""The door: keys, hosts, origins, open requests, and images from other hosts."""

import http.server
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from tests.mllm import tiny
from tests.serving.clients import file_of
from tests.serving.conftest import KEY, Served, serve
from unimm.errors import UserError
from unimm.serving import remote_images
from unimm.serving.engine import Engine
from unimm.serving.settings import EngineSettings, ServingSettings, read_api_keys


def get(url: str, **headers: str) -> int:
    """Return the status of a GET."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_key_is_needed_everywhere_but_for_health(served: Served) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
        assert get(served.url + path) == get(served.url + path, Authorization="Bearer sk-tes") == 401
        assert get(served.url + path, Authorization=f"Basic {KEY}") == 401
    assert get(f"{served.url}/v1/models", Authorization=f"Bearer {KEY}") == 200
    assert get(f"{served.url}/v1/models", Authorization="bearer other") == 200
    assert get(f"{served.url}/health") == 200
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        client.models.list()


def test_models_and_metrics(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["unimm"]
    assert served.client.models.retrieve("gpt-image-1").id == "gpt-image-1"
    served.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], max_tokens=2)
    request = urllib.request.Request(f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    page = urllib.request.urlopen(request).read().decode()
    assert 'unimm_requests_total{path="/v1/chat/completions",status="200"}' in page
    assert 'unimm_batch_size_count{kind="text"}' in page and "unimm_requests_waiting 0.0" in page


def test_other_hosts_and_origins_are_refused(tiny_served: Served) -> None:
    url = f"{tiny_served.url}/v1/models"
    assert get(url) == get(url, Origin=tiny_served.url) == 200
    assert get(url, Host="evil.example") == get(url, Host="[") == 403
    assert get(url, Origin="https://evil.example") == get(url, Origin="null") == get(url, Origin="http://[") == 403
    body = b'{"prompt": "x"}'
    request = urllib.request.Request(f"{tiny_served.url}/v1/images/generations", body, {"Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError, match="400"):  # a page may send plain text without asking
        urllib.request.urlopen(request)


def test_origins_can_be_allowed_and_aliases_limited() -> None:
    settings = ServingSettings(cors_origins=("https://a.example",), aliases=("mine",), api_keys=("k",), max_requests=0)
    for served in serve(Engine(*tiny.unified()), settings):
        headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        request = urllib.request.Request(f"{served.url}/v1/models", headers=headers, method="OPTIONS")
        with urllib.request.urlopen(request) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"
    settings = ServingSettings(aliases=("mine",))
    for served in serve(Engine(*tiny.unified()), settings):
        chat: Any = served.client.chat.completions.create
        assert chat(model="mine", messages=[{"role": "user", "content": "x"}], max_tokens=1).model == "mine"
        with pytest.raises(openai.NotFoundError, match="known are unimm, mine"):
            chat(model="gpt-5", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.NotFoundError):
            served.client.models.retrieve("gpt-5")


def test_full_means_429_with_retry_after() -> None:
    engine = Engine(*tiny.unified(), EngineSettings(queue_size=1, batch_wait=60))
    for served in serve(engine, ServingSettings(max_requests=2)):
        chat: Any = served.client.chat.completions.create
        question = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        thread = threading.Thread(target=chat, kwargs=question)
        thread.start()
        while engine.waiting < 1:
            pass
        with pytest.raises(openai.RateLimitError, match="busy") as full:
            chat(model="m", messages=[{"role": "user", "content": "x"}])
        assert int(full.value.response.headers["retry-after"]) >= 1
        held = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        held.sendall(
            b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nContent-Type: application/json\r\n\r\n"
        )
        status = 200
        while status == 200:  # until the held one is open, too
            status = get(f"{served.url}/v1/models")
        assert status == 429 and get(f"{served.url}/health") == 200
        held.close()
        engine.settings = EngineSettings(batch_wait=0)
        engine.close()
        thread.join()


def test_keys_come_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("UNIMM_API_KEYS", "a, b,,")
    assert read_api_keys(None) == ("a", "b") and "a" not in repr(ServingSettings(api_keys=("a-key",)).api_keys[:0])
    assert "secret" not in repr(ServingSettings(api_keys=("secret",)))
    (tmp_path / "keys").write_text("# mine\nc\n\n")
    assert read_api_keys(tmp_path / "keys") == ("c",)
    (tmp_path / "none").write_text("\n")
    for name, message in (("none", "holds 0 keys"), ("missing", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_api_keys(tmp_path / name)


# ---- images of other hosts ----

PRIVATE = ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1"]
PRIVATE += ["fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1", "::"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not remote_images.is_public(address)


def test_public_addresses_are() -> None:
    assert remote_images.is_public("8.8.8.8") and remote_images.is_public("2606:4700::1111")


def resolve(monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> None:
    """Let names resolve to these addresses."""

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host not in names and host != "127.0.0.1":
            raise OSError
        if host == "127.0.0.1":  # an address, which is connected to
            names[host] = [host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://other/a.png", "not fetched here"),
        ("http://inner/a.png", "not a public one"),
        ("http://mixed/a.png", "not a public one"),
        ("http://unknown/a.png", "is unknown"),
        ("http://inner:99/a.png", "not fetched here"),
        ("http://me@inner/a.png", "no address"),
        ("http://inner:x/a.png", "no address"),
        ("http://[::1/a.png", "no address"),
        ("http://inner/a\r\nHost: b", "no address"),
    ],
)
def test_refused_addresses(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, inner=["127.0.0.1"], mixed=["8.8.8.8", "10.0.0.1"])
    with pytest.raises(UserError, match=message):
        remote_images.fetch(url, ("inner", "mixed", "unknown"), 1000)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server on this machine, taken for a public one, with an image and redirects."""
    upload = file_of(Image.new("RGB", (20, 12), "red"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            targets = {"/there": "/a.png", "/loop": "/loop", "/inside": "http://inner/a.png"}
            if self.path in targets:
                self.send_response(302)
                self.send_header("Location", targets[self.path])
                self.end_headers()
            else:
                self.send_response(200 if self.path == "/a.png?x=1" or self.path == "/a.png" else 404)
                self.end_headers()
                self.wfile.write(upload)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    resolve(monkeypatch, site=["127.0.0.1"], inner=["127.0.0.2"])
    monkeypatch.setattr(remote_images, "is_public", lambda address: address == "127.0.0.1")
    yield f"site:{server.server_port}"
    server.shutdown()


def test_an_allowed_image_is_fetched_and_each_redirect_checked(site: str) -> None:
    hosts = (site, "inner")
    expected = file_of(Image.new("RGB", (20, 12), "red"))
    for path in ("/a.png", "/a.png?x=1", "/there"):
        assert remote_images.fetch(f"http://{site}{path}", hosts, 1000) == expected
    for path, most, message in (
        ("/loop", 1000, "redirects more than 3 times"),
        ("/inside", 1000, "not a public one"),
        ("/none", 1000, "the answer is 404"),
        ("/a.png", 20, "more than 20 bytes"),
    ):
        with pytest.raises(UserError, match=message):
            remote_images.fetch(f"http://{site}{path}", hosts, most)
    with pytest.raises(UserError, match="not fetched here"):
        remote_images.fetch(f"http://{site}/inside", (site,), 1000)
