"""Image saving. Writes are atomic: an image is written whole or not at all, and no existing file is overwritten by a
numbered one.
"""

import contextlib
import io
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from PIL import Image

from unimm.errors import UserError
from unimm.runs.provenance import check_output, write_atomically

WRITABLE = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""Suffix -> format of written images: other formats of Pillow lose colors or take minutes."""


def save_image_atomically(image: Image.Image, path: str | Path) -> Path:
    """Write `image` to `path` in the format of its suffix, creating missing folders; return the path.

    Raises:
        UserError: the suffix is not a writable image format, or the path cannot be written to.
    """
    path = check_image_output(path)
    encoded = io.BytesIO()
    image.save(encoded, WRITABLE[path.suffix.lower()])
    write_atomically(path, encoded.getvalue(), "image")
    return path


def check_image_output(path: str | Path) -> Path:
    """Return the path if an image can be written there; call it before the image is computed.

    Raises:
        UserError: the suffix is not a writable image format, or the path or one of its parents is in the way.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        known = ", ".join(WRITABLE)
        raise UserError(f"Cannot write an image as {path}: its name must end in an image format such as {known}.")
    return check_output(path, "image")


def save_images(images: Sequence[Image.Image], path: str | Path) -> list[Path]:
    """Write one image to `path`, or several to free names as `save_numbered` does; return the paths."""
    return [save_image_atomically(images[0], path)] if len(images) == 1 else save_numbered(images, path)


def save_numbered(images: Sequence[Image.Image], path: str | Path, first: int = 1) -> list[Path]:
    """Write the images to `NAME-1.png`, `NAME-2.png`, ... and return the paths. Only free names are used, also with
    concurrent writers: existing files are never overwritten.

    Args:
        first: number to start with; 0 is `path` itself.
    """
    saved: list[Path] = []
    for image in images:
        target, first = _reserved(check_image_output(path), first)
        try:
            saved.append(save_image_atomically(image, target))
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return saved


def _reserved(path: Path, first: int) -> tuple[Path, int]:
    """Create an empty file under the first free name, from number `first` on; return its path and the next number."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in count(first):
            target = path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path
            with contextlib.suppress(FileExistsError):
                target.open("xb").close()
                return target, number + 1
    except OSError as error:
        raise UserError(f"Cannot write the image {path}: {error.strerror or error}.") from None
    raise AssertionError("numbers do not end")
