"""`OnnxImageTokenizer`: run the ONNX files of an image tokenizer with numpy, Pillow and onnxruntime, without torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimm.data.images import read_image
from unimm.data.resizing import is_strip, padded_strip
from unimm.errors import UserError, reading

DESCRIPTION = "image_tokenizer.json"
GRAPHS: dict[str, dict[str, Any]] = {
    "encoder": {"input": "pixel_values", "outputs": ["features", "latents"]},
    "quantizer": {"input": "latents", "outputs": ["ids"]},
    "decoder": {"input": "ids", "outputs": ["pixels"]},
}
"""Each graph's input and outputs by name, in the order in which an image passes them."""


class OnnxImageTokenizer:
    """An image tokenizer from a folder that `unimm export --onnx` wrote; arrays are numpy, float32 or int64.

    Args:
        folder: the folder.
        providers: onnxruntime's execution providers, the first that is available is used.

    Raises:
        UserError: the folder holds no such export, or onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError("onnxruntime is not installed: pip install 'unimm[onnx]'.") from None
        with reading("The ONNX image tokenizer", folder):
            self.description: dict[str, Any] = json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))
            self._sessions = {
                name: onnxruntime.InferenceSession(Path(folder) / graph["file"], providers=list(providers))
                for name, graph in self.description["graphs"].items()
            }

    def preprocess(self, images: Sequence[Any]) -> np.ndarray:
        """Return pixel_values [B, 3, H, W] of images: whatever `unimm.data.images.read_image` accepts."""
        about = self.description
        pixels = np.stack([np.asarray(self._resized(read_image(image)), dtype=np.float32) for image in images])
        mean, std = (np.array(about[name], dtype=np.float32) for name in ("image_mean", "image_std"))
        return np.ascontiguousarray(((pixels * np.float32(1 / 255) - mean) / std).transpose(0, 3, 1, 2))

    def features(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return the continuous features [B, N, D] of pixel_values [B, 3, H, W]."""
        return self._encoded(pixel_values)[0]

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return the ids [B, M] of pixel_values [B, 3, H, W]."""
        return self._run("quantizer", self._encoded(pixel_values)[1])[0]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Return the pixels [B, 3, H, W] in [0, 1] of ids [B, M] in raster order.

        Raises:
            UserError: an id outside the codebook, or another number of ids than an image has.
        """
        ids, size = np.asarray(ids, dtype=np.int64), self.description["codebook_size"]
        rows, columns = self.description["grid"]
        if ids.ndim != 2 or ids.shape[1] != rows * columns:
            raise UserError(f"An image has {rows} x {columns} = {rows * columns} ids, these are {list(ids.shape)}.")
        if ids.size and not (ids.min() >= 0 and ids.max() < size):
            raise UserError(f"Image ids run from 0 to {size - 1}; these run from {ids.min()} to {ids.max()}.")
        return self._run("decoder", ids)[0]

    @staticmethod
    def images(pixels: np.ndarray) -> list[Image.Image]:
        """Return pixels [B, 3, H, W] in [0, 1] as RGB images, rounded to 8 bits."""
        return [Image.fromarray(each) for each in (pixels * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)]

    def _encoded(self, pixel_values: np.ndarray) -> list[np.ndarray]:
        side = self.description["image_size"]
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, side, side):
            raise UserError(f"pixel_values are [B, 3, {side}, {side}] here, not {list(pixel_values.shape)}.")
        return self._run("encoder", np.asarray(pixel_values, dtype=np.float32))

    def _run(self, name: str, given: np.ndarray) -> list[np.ndarray]:
        return self._sessions[name].run(None, {GRAPHS[name]["input"]: given})

    def _resized(self, image: Image.Image) -> Image.Image:
        side, resample = self.description["image_size"], Image.Resampling[self.description["resample"].upper()]
        if self.description["pad_to_square"]:
            color = tuple(int(255 * channel) for channel in self.description["image_mean"])
            longer = max(image.size)
            if is_strip(image.size, (longer, longer)):
                return padded_strip(image, (side, side), color, resample)
            square = Image.new("RGB", (longer, longer), color)
            square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
            image = square
        return image.resize((side, side), resample)
