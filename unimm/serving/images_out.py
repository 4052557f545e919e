"""Drawn images as the bytes that a request asks for: base64, data URLs, or URLs of images that are kept in memory."""

import base64
import io
import re
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass

from PIL import Image

from unimm.errors import UserError, shown

_SIZE = re.compile(r"(\d{1,5})\s*x\s*(\d{1,5})")


@dataclass(frozen=True)
class ImageFormat:
    """The file format of drawn images: png, jpeg or webp, and the quality of the last two, 0 to 100."""

    name: str = "png"
    quality: int = 100

    @property
    def media_type(self) -> str:
        """Return the format's media type."""
        return f"image/{self.name}"

    def encode(self, image: Image.Image) -> bytes:
        """Return the image as a file's bytes."""
        file = io.BytesIO()
        if self.name == "png":
            image.save(file, "PNG")
        else:
            image.save(file, self.name.upper(), quality=max(self.quality, 1))
        return file.getvalue()

    def base64(self, image: Image.Image) -> str:
        """Return the file's bytes as base64 text."""
        return base64.b64encode(self.encode(image)).decode()

    def data_url(self, image: Image.Image) -> str:
        """Return the image as a data URL."""
        return f"data:{self.media_type};base64,{self.base64(image)}"


def check_size(size: str | None, drawn: int) -> None:
    """Raise UserError unless `size` is absent, "auto" or the size in pixels that the model draws."""
    if size in (None, "", "auto"):
        return
    found = _SIZE.fullmatch(size.strip().lower()) if size is not None else None
    if found is None or (int(found[1]), int(found[2])) != (drawn, drawn):
        raise UserError(f"size is {shown(size)} and this model draws {drawn}x{drawn}: give that, or auto.")


class ImageStore:
    """The last drawn images, under names that cannot be guessed. Safe to use from several threads.

    Args:
        size: images that are kept; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, data: bytes, media_type: str) -> str:
        """Keep an image, drop the oldest if there are too many, and return its name."""
        name = secrets.token_urlsafe(32)
        with self._lock:
            self._kept[name] = (data, media_type)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Return the bytes and the media type of a kept image, or None."""
        with self._lock:
            return self._kept.get(name)
