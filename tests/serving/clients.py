"""What the tests send, and what they make of the answers."""

import base64
import io
from typing import Any

from PIL import Image

from unimm.data.shapes import Scene, render
from unimm.data.shapes.world import sample_scene


def data_url(image: Image.Image, name: str = "png") -> str:
    """Return an image as a data URL."""
    return f"data:image/{name};base64,{base64.b64encode(file_of(image, name)).decode()}"


def file_of(image: Image.Image, name: str = "png") -> bytes:
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, name)
    return file.getvalue()


def image_of(text: str) -> Image.Image:
    """Return the image of base64 text or of a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2])))


def about(image: Image.Image, text: str) -> dict[str, Any]:
    """Return a message about an image in the form of chat completions."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def scene(seed: int = 0) -> Image.Image:
    """Return an image of the shapes data set."""
    import numpy as np

    found: Scene = sample_scene(np.random.default_rng(seed))
    return render(found)
