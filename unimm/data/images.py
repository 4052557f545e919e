"""Pictures from disk as RGB, and back, whatever their file holds.

Special: transparency is laid on white, 16 bits are scaled (not clipped) to 8, the EXIF orientation is applied, an
animation gives its first frame, CMYK and palettes become RGB. A file that is missing, cut off, no picture or too large
is one sentence (`UserError`). Writing is atomic: a picture appears complete or not at all.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unimm.errors import UserError
from unimm.provenance import check_output, write_atomically

MAX_PIXELS = 64_000_000
"""Pictures with more pixels are refused before they are unpacked (192 MB as RGB)."""

DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, MemoryError)
"""What Pillow's decoders raise on damaged files."""

Check = Callable[[tuple[int, int]], None]
"""Is given (width, height) before the pixels are unpacked, and raises what a reader does not want to read."""

_PROBES = 16


def load_image(path: str | Path, check: Check | None = None) -> Image.Image:
    """Read a picture file as an RGB image, upright.

    Raises:
        UserError: the file is missing, is no picture, is cut off or damaged, or holds more than `MAX_PIXELS` pixels.
    """
    with _bombs_left_to_us(), _opened(Path(path)) as image:
        return _unpacked(image, check)


def decode_image(data: bytes, name: str, check: Check | None = None) -> Image.Image:
    """As `load_image`, of the file's bytes; `name` is what messages call it."""
    with _bombs_left_to_us(), _understood(io.BytesIO(data), len(data), name) as image:
        return _unpacked(image, check)


def _unpacked(image: Image.Image, check: Check | None) -> Image.Image:
    if check is not None:
        check(image.size)
    image.seek(0)
    image.load()
    return to_rgb(image)


def unreadable_images(paths: Iterable[Path]) -> dict[Path, UserError]:
    """Those that `load_image` would refuse, as far as the files' first bytes tell, and why: all but cut-off and damaged
    pictures. Many are looked at together, because disks answer late rather than slowly."""

    def check(path: Path) -> UserError | None:
        try:
            with _opened(path):
                return None
        except UserError as error:
            return error

    ordered = sorted(set(paths))
    with _bombs_left_to_us(), ThreadPoolExecutor(_PROBES) as pool:  # filters of warnings belong to no thread
        return {path: error for path, error in zip(ordered, pool.map(check, ordered), strict=True) if error is not None}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture of a file, not unpacked yet; what goes wrong within becomes one sentence."""
    if not path.is_file():
        reason = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"Cannot read the picture {path}: {reason}.")
    with _understood(path, path.stat().st_size, str(path)) as image:
        yield image


@contextlib.contextmanager
def _understood(file: Path | io.BytesIO, size: int, name: str) -> Iterator[Image.Image]:
    if size == 0:
        raise UserError(f"Cannot read the picture {name}: the file is empty.")
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                pixels = f"{width} x {height} = {width * height} pixels"
                raise UserError(f"The picture {name} has {pixels}, more than {MAX_PIXELS}: make it smaller first.")
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        what = "a web page" if _is_web_page(file) else "not a picture in a known format"
        raise UserError(f"Cannot read the picture {name}: it is {what}.") from None
    except Image.DecompressionBombError:
        raise UserError(f"The picture {name} has far more than {MAX_PIXELS} pixels: make it smaller first.") from None
    except PermissionError:
        raise UserError(f"Cannot read the picture {name}: permission denied.") from None
    except DECODER_ERRORS as error:
        raise UserError(f"Cannot read the picture {name}: the file is cut off or damaged ({error}).") from None


def _is_web_page(file: Path | io.BytesIO) -> bool:
    """What a failed download leaves behind."""
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:512]
    else:
        with file.open("rb") as opened:
            head = opened.read(512)
    return head.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright 8-bit RGB; transparent parts show white. The argument is left as it was."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


WRITABLE = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""Suffix -> format of the images that are written: others that Pillow knows lose colors or take minutes."""


def save_image_atomically(image: Image.Image, path: str | Path) -> Path:
    """Write `image` to `path` in the format of its suffix, making missing folders; returns the path.

    Raises:
        UserError: the suffix names no format that can be written, or the place cannot be written to.
    """
    path = check_image_output(path)
    encoded = io.BytesIO()
    image.save(encoded, WRITABLE[path.suffix.lower()])
    write_atomically(path, encoded.getvalue(), "picture")
    return path


def check_image_output(path: str | Path) -> Path:
    """The path, if a picture can be written there by its name: asked before the work that makes the picture.

    Raises:
        UserError: the suffix names no format that can be written, or the path or one of its parents stands in the way.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        known = ", ".join(WRITABLE)
        raise UserError(f"Cannot write a picture as {path}: its name must end in a picture format such as {known}.")
    return check_output(path, "picture")


def numbered_paths(path: str | Path, count: int) -> list[Path]:
    """Where `count` pictures go: the path itself for one, `NAME-1.png`, `NAME-2.png`, ... for more."""
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def save_images(images: Sequence[Image.Image], path: str | Path) -> list[Path]:
    """Write the pictures to `numbered_paths(path, len(images))` and return those paths."""
    paths = numbered_paths(path, len(images))
    return [save_image_atomically(image, target) for image, target in zip(images, paths, strict=True)]


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as 8-bit grey: Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":  # no format says what white is: [0, 1] if the values fit there, else 8 or 16 bits
        top = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), float(values.max()))
    else:
        top = 65535.0 if values.max() <= 65535 else float(2**32 - 1) if values.max() > 2**31 - 1 else float(2**31 - 1)
    return Image.fromarray(np.clip(values / top * 255.0, 0, 255).round().astype(np.uint8))


@contextlib.contextmanager
def _bombs_left_to_us() -> Iterator[None]:
    """Silence Pillow's warning about large pictures: the limit here is `MAX_PIXELS`, and it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
