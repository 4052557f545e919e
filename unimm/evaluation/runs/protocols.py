"""Named preprocessing protocols of the benchmarks.

Reconstruction and generation scores depend mostly on conventions (crop, filter, rounding, reference set), so each
convention has a name and is recorded with every result.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unimm.data.resizing import adm_crop, crop, resized_crop

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def torchvision_crop(image: Image.Image, size: int, filter_name: str = "bilinear") -> Image.Image:
    """Center-crop as torchvision's Resize(size) and CenterCrop(size) do; the long side is truncated, not rounded."""
    scale = size / min(image.size)
    width, height = (size if side == min(image.size) else int(side * scale) for side in image.size)
    corner = round((width - size) / 2), round((height - size) / 2)
    return resized_crop(image, (width, height), corner, size, FILTERS[filter_name])


CROPS: dict[str, Callable[[Image.Image, int, str], Image.Image]] = {
    "adm": lambda image, size, name: adm_crop(image, size, FILTERS[name]),
    "torchvision": torchvision_crop,
    "short_side": lambda image, size, _: crop(image, size),  # the crop of training
}


@dataclass(frozen=True)
class Protocol:
    """The preprocessing protocol of a reconstruction benchmark; every field is recorded with the result.

    Args:
        crop: a key of `CROPS`.
        resize_filter: filter of the crop, and of a decoded image that is scored at another size; a key of `FILTERS`.
        rounding: rounding of decoded pixels to 8 bits, before any metric is computed.
        reference: the images that the decoded ones are compared with.
    """

    name: str
    crop: str
    resize_filter: str = "bicubic"
    rounding: str = "nearest, half to even"
    reference: str = "the same images, cut alike"

    def cut(self, image: Image.Image, size: int) -> Image.Image:
        """Crop the image to `size` x `size` pixels."""
        return CROPS[self.crop](image, size, self.resize_filter)

    def resized(self, image: np.ndarray, size: int) -> np.ndarray:
        """Resize a decoded image, uint8 [H, W, 3], to the size at which it is scored."""
        if image.shape[:2] == (size, size):
            return image
        return np.asarray(Image.fromarray(image).resize((size, size), FILTERS[self.resize_filter]))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("adm", "adm"),
        Protocol("torchvision", "torchvision", "bilinear"),
        Protocol("short_side", "short_side"),
    )
}
