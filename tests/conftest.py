"""Every test: offline (a connection to another machine fails it), seeded, one thread; real data only if it is there.

torch is imported where it is used: of several processes the first runs no test, and starts the others sooner.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ipaddress
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


class NetworkUsed(Exception):
    """A test reached for the network."""


def is_local(address: Any) -> bool:
    """Whether a socket address is this machine: a Unix path, localhost, or a loopback IP."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A library may swallow the exception: the addresses that it tried are remembered, and fail the test at its end."""
    tried: list[Any] = []

    def guard(name: str) -> Callable[..., Any]:
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            if not is_local(address):
                tried.append(address)
                raise NetworkUsed(f"tests are offline, but one connects to {address}")
            return original(self, address)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard(name))
    yield tried
    assert not tried, f"tests are offline, but this one connected to {tried}"


@pytest.fixture(scope="session", autouse=True)
def same_on_every_machine() -> Iterator[None]:
    """One thread, and precision `auto` is float32: no figure depends on how many cores there are and what they multiply
    fast. For the fixtures of modules too, which come before any fixture of a test."""
    import torch

    from unimm import bfloat16

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "multiplies_bfloat16", lambda device: False)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests first: of several processes none is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def unimm_data() -> Callable[[str], Path]:
    """`unimm_data("data/cc0")`: real data under $UNIMM_DATA (default ../shared), or a skip that says so."""
    root = Path(os.environ.get("UNIMM_DATA", ROOT.parent / "shared"))

    def find(relative: str) -> Path:
        path = root / relative
        if not path.exists():
            pytest.skip(f"needs real data: {relative} in $UNIMM_DATA (default ../shared)")
        return path

    return find


@pytest.fixture(scope="module")
def parts() -> tuple:
    """A tiny unified model and its processor, for a module."""
    from tests.mllm import tiny

    return tiny.unified(rows=301)


@pytest.fixture
def session(parts: tuple) -> Any:
    """A conversation with `parts`."""
    from unimm.chat import ChatSession

    return ChatSession(*parts, max_new_tokens=6)
