"""A server on the embedded model, with the real clients of its API."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from openai import OpenAI

import unimm
from tests.mllm import tiny
from unimm.serving.app import create_app
from unimm.serving.engine import Engine
from unimm.serving.run import serving
from unimm.serving.settings import EngineSettings, ServingSettings

KEY = "sk-test"


@dataclass
class Served:
    """A running server, the engine behind it, and its address."""

    engine: Engine
    url: str

    @property
    def client(self) -> OpenAI:
        """Return OpenAI's own client, which does not repeat refused requests."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def parts() -> tuple[Any, Any]:
    """The embedded model and its processor; the engine's thread and a test never run it at the same time."""
    return unimm.load()


def serve(engine: Engine, settings: ServingSettings) -> Iterator[Served]:
    """Run the app over an engine."""
    with serving(create_app(engine, settings)) as url:
        yield Served(engine, url)


@pytest.fixture(scope="session")
def served(parts: tuple[Any, Any]) -> Iterator[Served]:
    """The embedded model's server."""
    torch.set_num_threads(1)
    yield from serve(Engine(*parts), ServingSettings(api_keys=("other", KEY), kept_images=4))


@pytest.fixture(scope="session")
def tiny_served() -> Iterator[Served]:
    """A server with a random model of the smallest size: 256 tokens of context, 16 image tokens."""
    torch.set_num_threads(1)
    settings = ServingSettings(max_image_pixels=10_000, max_body=200_000, allowed_hosts=("127.0.0.1",))
    yield from serve(Engine(*tiny.unified(), EngineSettings(queue_size=8)), settings)
