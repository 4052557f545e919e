"""Image loading: paths, URLs, base64, Pillow images and arrays to upright RGB.

The processors, the command line, chat, the recipes' data and the benchmarks all load images with `read_image`.
Transparent parts become white, 16 bits are scaled (not clipped) to 8, the EXIF orientation is applied, an animation
returns its first frame, CMYK and palettes become RGB. A broken EXIF orientation is ignored. A file that is missing,
truncated, not an image or too large raises a one-sentence `UserError`.
"""

import base64
import contextlib
import http.client
import io
import os
import struct
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from unimm.data.arrays import eight_bits, is_array, rgb_array, to_numpy
from unimm.errors import UserError

MAX_PIXELS = 64_000_000
"""Images with more pixels are refused before they are decoded (192 MB as RGB)."""

DECODER_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, RuntimeError, struct.error, zlib.error),
)
"""What Pillow's decoders, and its readers of metadata, raise on damaged files."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transpose that makes the image upright."""

Check = Callable[[tuple[int, int]], None]
"""Receives (width, height) before the pixels are decoded, and raises to reject the image."""

_PROBES = 16
NAME_LENGTH = 100
"""Characters of a URL or of base64 text that a message shows."""
FETCH_SECONDS = 60
SHORTEST_BASE64 = 80
"""Characters of the smallest image as base64 text; a shorter string can only be a path."""


def read_image(source: Any) -> Image.Image:
    """Return one image as upright RGB.

    Args:
        source: a path, an http(s) URL, base64 text (with or without "data:image/...;base64,"), a Pillow image of any
            mode, or an array or tensor (`unimm.data.arrays`).

    Raises:
        UserError: the source cannot be read, or has another type.
    """
    if isinstance(source, Image.Image):
        with _told("that was given"):
            return to_rgb(source)
    if is_array(source):
        return Image.fromarray(np.ascontiguousarray(eight_bits(rgb_array(source))))
    if isinstance(source, str) and (data := _fetched(source)) is not None:
        return decode_image(data, source if len(source) <= NAME_LENGTH else f"{source[:NAME_LENGTH]}...")
    if isinstance(source, str | Path):
        return load_image(source)
    raise UserError(f"An image is a path, a Pillow image, an array or a tensor, not {type(source).__name__}.")


def each_image(sources: Any) -> list[Any]:
    """Flatten an image, a nested list of images or a batched array into a list of single images; None returns []."""
    if sources is None:
        return []
    if isinstance(sources, list | tuple):
        return [each for source in sources for each in each_image(source)]
    if is_array(sources) and sources.ndim > 3:
        return [each for source in to_numpy(sources) for each in each_image(source)]
    return [sources]


def load_image(path: str | Path, check: Check | None = None) -> Image.Image:
    """Load an image file as upright RGB.

    Raises:
        UserError: the file is missing, not an image, truncated or damaged, or has more than `MAX_PIXELS` pixels.
    """
    with _pillow_silenced(), _opened(Path(path)) as image:
        return _unpacked(image, check)


def decode_image(
    data: bytes, name: str, check: Check | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode the bytes of an image file as `load_image` does; `name` identifies it in error messages, `formats` are
    those of Pillow that are tried (None: all)."""
    with _pillow_silenced(), _understood(io.BytesIO(data), len(data), name, formats) as image:
        return _unpacked(image, check)


def _unpacked(image: Image.Image, check: Check | None) -> Image.Image:
    if check is not None:
        check(image.size)
    image.seek(0)  # first frame of an animation
    image.load()
    return to_rgb(image)


def unreadable_images(paths: Iterable[Path]) -> dict[Path, UserError]:
    """Return {path: error} for the files that `load_image` would refuse, from their headers only: truncated or damaged
    pixels are not found. Files are opened in parallel, because storage latency dominates."""

    def check(path: Path) -> UserError | None:
        try:
            with _opened(path):
                return None
        except UserError as error:
            return error

    ordered = sorted(set(paths))
    with _pillow_silenced(), ThreadPoolExecutor(_PROBES) as pool:  # warning filters are global: set them once, here
        return {path: error for path, error in zip(ordered, pool.map(check, ordered), strict=True) if error is not None}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file without decoding it; errors inside the context become a one-sentence `UserError`."""
    with _told(str(path)):
        if not path.is_file():
            reason = "it is a folder" if path.is_dir() else "there is no such file"
            raise UserError(f"Cannot read the image {path}: {reason}.")
        size = path.stat().st_size
    with _understood(path, size, str(path)) as image:
        yield image


@contextlib.contextmanager
def _understood(
    file: Path | io.BytesIO, size: int, name: str, formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    if size == 0:
        raise UserError(f"Cannot read the image {name}: the file is empty.")
    try:
        with _told(name), Image.open(file, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                pixels = f"{width} x {height} = {width * height} pixels"
                raise UserError(f"The image {name} has {pixels}, more than {MAX_PIXELS}: make it smaller first.")
            yield image
    except UnidentifiedImageError:
        what = "a web page" if _is_web_page(file) else "not an image in a known format"
        raise UserError(f"Cannot read the image {name}: it is {what}.") from None


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Convert Pillow's errors about a damaged file into a one-sentence `UserError`."""
    try:
        yield
    except (UserError, UnidentifiedImageError):
        raise
    except Image.DecompressionBombError:
        raise UserError(f"The image {name} has far more than {MAX_PIXELS} pixels: make it smaller first.") from None
    except PermissionError:
        raise UserError(f"Cannot read the image {name}: permission denied.") from None
    except DECODER_ERRORS as error:
        raise UserError(f"Cannot read the image {name}: the file is cut off or damaged ({error}).") from None


def _is_web_page(file: Path | io.BytesIO) -> bool:
    """Return whether the file is an HTML page, which a failed download leaves behind."""
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:512]
    else:
        with file.open("rb") as opened:
            head = opened.read(512)
    return head.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to upright 8-bit RGB without metadata; transparent parts become white. The argument is
    not modified."""
    if not (image.width and image.height):
        raise UserError(f"An image of {image.width} x {image.height} holds no pixels.")
    turn = TURNS.get(_orientation(image))
    image = image.copy() if turn is None else image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    image.info = {}  # drop EXIF, or a second call would rotate the image again
    return image


def _orientation(image: Image.Image) -> Any:
    """Return the EXIF orientation, or 1 if it cannot be read."""
    image.load()  # some formats store their metadata after the pixels
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODER_ERRORS:
        return 1


def _fetched(source: str) -> bytes | None:
    """Fetch a URL or decode base64 text to bytes; return None for a path."""
    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=FETCH_SECONDS) as answer:
                return bytes(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"Cannot fetch the image {source}: {error}.") from None
    if source.startswith("data:image/"):
        source = source.partition(",")[2]
    elif len(source) < SHORTEST_BASE64 or os.path.exists(source):
        return None
    try:
        return base64.b64decode("".join(source.split()), validate=True)
    except ValueError:
        return None


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit, 32-bit and float gray to 8-bit gray: Pillow's conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError("The image holds values that are not finite (NaN or infinite): replace them first.")
    if image.mode == "F":  # float formats do not define white: [0, 1] if the values fit, else 8 or 16 bits
        top = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), float(values.max()))
    else:
        top = 65535.0 if values.max() <= 65535 else float(2**32 - 1) if values.max() > 2**31 - 1 else float(2**31 - 1)
    return Image.fromarray(np.clip(values / top * 255.0, 0, 255).round().astype(np.uint8))


@contextlib.contextmanager
def _pillow_silenced() -> Iterator[None]:
    """Silence Pillow's warnings about large images (`MAX_PIXELS` is checked as an error) and about broken metadata
    (unused)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield
