"""Files of the page: uploads arrive as bytes and are never fetched from a URL; a folder for what it shows."""

import os
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils, utils
from gradio.components.base import server
from gradio_client.utils import is_http_url_like
from PIL import Image

from unimm.data.shapes import Scene, SceneObject, render

_FOLDER = "GRADIO_TEMP_DIR"
_MOST_BLOBS = 32  # painted images whose edit has not been asked for
_MOST_LAYERS = 8
_EXAMPLE_SIDE = 256  # pixels

EXAMPLES: dict[str, Scene] = {
    "two.png": Scene(
        (SceneObject("square", "blue", 76, 136, 38), SceneObject("circle", "yellow", 186, 116, 42)),
        "white",
        _EXAMPLE_SIDE,
    ),
    "three.png": Scene(
        (
            SceneObject("ring", "purple", 66, 76, 36),
            SceneObject("triangle", "green", 184, 82, 40),
            SceneObject("diamond", "orange", 122, 186, 40),
        ),
        "cream",
        _EXAMPLE_SIDE,
    ),
    "one.png": Scene((SceneObject("cross", "pink", 132, 124, 52),), "black", _EXAMPLE_SIDE),
}
"""Scenes of the shapes data set by the names of their files."""


def own_folder() -> Path:
    """Return the folder in which gradio keeps the page's files: private, and gone when the process ends."""
    if _FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="unimm-web-", ignore_cleanup_errors=True)
        _folders.append(folder)  # it is removed with this reference
        os.environ[_FOLDER] = folder.name
    return Path(os.environ[_FOLDER])


_folders: list[tempfile.TemporaryDirectory[str]] = []


def write_examples() -> dict[str, str]:
    """Write the example images where the page may show them; return their paths by name."""
    folder = own_folder() / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in EXAMPLES.items():
        render(scene).save(folder / name)
    gr.set_static_paths([folder])
    return {name: str(folder / name) for name in EXAMPLES}


def saved(image: Image.Image) -> str:
    """Write an image as a PNG file that the page may show; return its path."""
    return str(processing_utils.save_pil_to_cache(image, utils.get_upload_folder(), format="png"))


def without_urls(component: Any) -> Any:
    """Make a component refuse files that are URLs, which gradio would fetch. Return it."""
    move, move_async = component.move_resource_to_block_cache, component.async_move_resource_to_block_cache

    def check(path: Any) -> None:
        if path is not None and is_http_url_like(str(path)):
            raise gr.Error("Images are not fetched from URLs here: upload the image.", print_exception=False)

    def checked(path: Any) -> Any:
        check(path)
        return move(path)

    async def checked_async(path: Any) -> Any:
        check(path)
        return await move_async(path)

    # on the object: gradio writes a stub file beside the source of every class that is derived from a component
    vars(component).update(move_resource_to_block_cache=checked, async_move_resource_to_block_cache=checked_async)
    return component


def as_bytes(component: Any) -> Any:
    """Make an image component hand over its file's bytes, not decoded: that is done within the server's limits."""
    vars(without_urls(component)).update(preprocess=lambda data: None if data is None else _read(data))
    return component


def as_painted(component: Any) -> Any:
    """Make an image editor hand over the bytes of its "background" and of its "layers". Return it."""
    accept = component.accept_blobs

    @server
    def accept_some(data: Any) -> Any:
        index = data.data["index"]
        if index and index != "null" and not 0 <= int(index) < _MOST_LAYERS:
            raise gr.Error("There are too many layers.", print_exception=False)
        while len(component.blob_storage) >= _MOST_BLOBS:
            component.blob_storage.pop(next(iter(component.blob_storage)))
        return accept(data)

    def preprocess(data: Any) -> dict[str, Any] | None:
        found = data if data is None or data.id is None else component.blob_storage.pop(data.id, None)
        if found is None:
            return None
        layers = [_read(layer) for layer in found.layers if layer is not None]
        return {"background": None if found.background is None else _read(found.background), "layers": layers}

    vars(without_urls(component)).update(preprocess=preprocess, accept_blobs=accept_some)
    return component


def _read(data: Any) -> bytes:
    """Return the bytes of a file in gradio's cache, whose path gradio has checked, or bytes as they are."""
    return data if isinstance(data, bytes) else Path(data.path).read_bytes()
