"""Settings of the server: sizes of queue and batches, limits of a request, who may ask."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from unimm.errors import UserError

KEYS_VARIABLE = "UNIMM_API_KEYS"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of queue and batches.

    Args:
        queue_size: requests that may wait; further ones are told to come back later.
        queue_pixels: pixels of images that waiting and running requests may keep in memory (3 bytes each).
        batch_tokens: tokens of a batch, rows times the longest row.
        batch_memory: bytes of the KV cache of a batch, a second bound on its tokens.
        batch_wait: seconds that the first request of a batch waits for others while the model is idle.
    """

    queue_size: int = 256
    queue_pixels: int = 256_000_000
    batch_tokens: int = 16_384
    batch_memory: int = 1 << 30
    batch_wait: float = 0.005


@dataclass(frozen=True)
class ServingSettings:
    """Settings of the app.

    Args:
        model_name: the name of the model in answers to clients that name none.
        aliases: model names that a request may use; empty: any.
        api_keys: a request needs one of them; empty: everyone may ask.
        allowed_hosts: values of the Host header (without port) that are answered; empty: any.
        cors_origins: origins whose pages may call the server; empty: only its own.
        image_hosts: hosts from which images may be fetched by URL; empty: none.
        max_body: bytes of a request.
        max_image_pixels: pixels of an image.
        max_images: images of a request.
        max_prompt: characters of a prompt or of a whole conversation.
        max_n: images or answers of a request.
        max_new_tokens: tokens of an answer, if a request names no number.
        max_requests: requests that may be open at once, waiting for their answers or sending their bodies.
        kept_images: number of images that are kept in memory for `response_format="url"`; 0: no URLs.
    """

    model_name: str = "unimm"
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    max_body: int = 16 << 20
    max_image_pixels: int = 16_000_000
    max_images: int = 16
    max_prompt: int = 32_000
    max_n: int = 10
    max_new_tokens: int = 256
    max_requests: int = 512
    kept_images: int = 0


def read_api_keys(file: str | Path | None) -> tuple[str, ...]:
    """Return the API keys of a file, one per line, or else of the environment variable UNIMM_API_KEYS, separated by
    commas.

    Raises:
        UserError: if the file cannot be read or holds no key.
    """
    if file is None:
        return tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The file of API keys {file} cannot be read: {error}.") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError(f"The file of API keys {file} holds 0 keys: write at least 1, one per line.")
    return keys
