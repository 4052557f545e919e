"""Shared parts of our HTML reports: one style sheet, and images inlined so that a report is a single file."""

import base64
import io
from importlib import resources

from PIL import Image

LOSSLESS_SIDE = 128
"""Images up to this many pixels a side are PNG, larger ones JPEG."""


def base_style() -> str:
    """Return the CSS for colors (light and dark) and text."""
    return resources.files("unimm.evaluation.runs").joinpath("page.css").read_text(encoding="utf-8")


def data_uri(image: Image.Image, *, longest_side: int | None = None) -> str:
    """Return the image as a data URI, downscaled if a side is longer than `longest_side`."""
    if longest_side is not None and max(image.size) > longest_side:
        image = image.copy()
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small = max(image.size) <= LOSSLESS_SIDE
    image.save(buffer, format="PNG", optimize=True) if small else image.save(buffer, format="JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
