"""The server on many machines: `serve run unimm.serving.ray_app:app replicas=4 gpus=1`, with Ray Serve.

Each replica is one engine over its own copy of the model, and batches what it is given. The ingress checks the keys,
reads the requests, and sends each to the replica with the shortest queue. Ray itself sends a request again only while
no replica has taken it, and answers 500 for what ran in one that died; so the ingress repeats those.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.types import Message

from unimm.errors import UserError
from unimm.serving.errors import APIError
from unimm.serving.forwarding import Forward, forwarding_app, messages_of
from unimm.serving.settings import LOOPBACK, EngineSettings, ServingSettings, read_api_keys

REPLICA = "Replica"


class Options(BaseModel):
    """What `serve run unimm.serving.ray_app:app NAME=VALUE ...` takes, or `args` of a Serve config file.

    Args:
        model: a folder that every machine sees, or a hub id; None is the embedded model.
        replicas: number of replicas, the smallest one if `max_replicas` is given.
        max_replicas: the largest number of replicas; Ray adds and removes them by load.
        target_requests: open requests per replica that Ray aims at when it adds and removes replicas.
        cpus, gpus: what Ray sets aside for a replica; torch uses `cpus` threads.
        queue: requests that a replica takes, running or waiting; as many more wait in the ingress.
        ingresses: number of processes that forward requests.
        without_keys: answer everyone who reaches Ray's address, if there are no API keys.
        serving, engine: the settings of each replica's app and engine; API keys come from UNIMM_API_KEYS.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    replicas: PositiveInt = 1
    max_replicas: PositiveInt | None = None
    target_requests: PositiveFloat = 8.0
    cpus: NonNegativeFloat = 1.0
    gpus: NonNegativeFloat = 0.0
    queue: PositiveInt = 64
    ingresses: PositiveInt = 1
    without_keys: bool = False
    serving: ServingSettings = ServingSettings()
    engine: EngineSettings = EngineSettings()


class Replica:
    """One copy of the model with its engine and its app."""

    def __init__(self, model: str | None, settings: ServingSettings, engine_settings: EngineSettings) -> None:
        from unimm.mllm import load
        from unimm.serving.app import create_app
        from unimm.serving.engine import Engine

        self.engine = Engine(*load(model), engine_settings)
        self.app = create_app(self.engine, settings, close_engine=False)

    async def messages(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Answer a request: yield the ASGI messages of the app."""
        async for message in messages_of(self.app, scope, body):
            yield message

    def check_health(self) -> None:
        """Raise if the engine has stopped; Ray then replaces the replica."""
        if not self.engine.alive:
            raise RuntimeError("The engine has stopped.")


def app(options: Options) -> Any:
    """Build the Ray Serve application.

    Raises:
        UserError: if `max_replicas` is below `replicas`, or images are to be kept for URLs.
    """
    settings = _settings(options)
    replica = serve.deployment(
        name=REPLICA,
        max_ongoing_requests=options.queue,
        max_queued_requests=options.queue,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        graceful_shutdown_timeout_s=30,
        **_scale(options),
    )(Replica)

    def build_ingress() -> FastAPI:
        handle = serve.get_deployment_handle(REPLICA, serve.get_replica_context().app_name)
        messages = handle.options(stream=True, method_name="messages")

        async def ask(scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
            answer = messages.remote(scope, body)
            try:
                async for message in answer:
                    yield message
            finally:
                answer.cancel()  # frees the place of a client that has hung up; does nothing after the end

        return forwarding_app(Forward(ask, RayActorError, _refusal), settings)

    ingress = serve.deployment(
        name="Ingress",
        num_replicas=options.ingresses,
        max_ongoing_requests=settings.max_requests,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress(build_ingress)())
    return ingress.bind(replica.bind(options.model, settings, replace(options.engine, queue_size=options.queue)))


def _settings(options: Options) -> ServingSettings:
    """Return the settings of the apps: with the environment's keys, or else for clients of this machine only."""
    if kept := options.serving.kept_images:
        raise UserError(f"kept_images is {kept} and each replica would keep its own: leave it 0.")
    keys = options.serving.api_keys or read_api_keys(None)
    name = options.serving.model_name
    if name == ServingSettings.model_name and options.model:
        name = Path(options.model).name
    hosts = options.serving.allowed_hosts or (() if keys or options.without_keys else LOOPBACK)
    return replace(options.serving, api_keys=keys, model_name=name, allowed_hosts=hosts)


def _scale(options: Options) -> dict[str, Any]:
    """Return how many replicas there are, as Ray's settings say it."""
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    if options.max_replicas < options.replicas:
        raise UserError(
            f"max_replicas is {options.max_replicas} and replicas is {options.replicas}: give at least as many."
        )
    return {
        "autoscaling_config": {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_requests,
        }
    }


def _refusal(error: Exception) -> APIError | None:
    """Return the answer to what Ray refuses to forward."""
    if isinstance(error, BackPressureError):
        return APIError(
            429, "All replicas are busy: try again in 1 s.", code="rate_limit_exceeded", headers={"Retry-After": "1"}
        )
    if isinstance(error, DeploymentUnavailableError):
        return APIError(503, "The replicas could not be started; the log of Ray Serve says why.")
    return None
