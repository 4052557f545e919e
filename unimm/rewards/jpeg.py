"""JPEG compressibility (DDPO, https://arxiv.org/abs/2305.13301): a reward that needs no model."""

import io
from collections.abc import Sequence

from PIL import Image

from unimm.rewards.base import Metadata

QUALITY = 95  # as in DDPO


class JPEGReward:
    """Minus the size of the image as a JPEG, in kilobytes."""

    def score(self, prompts: Sequence[str], metadata: Sequence[Metadata], images: Sequence[Image.Image]) -> list[float]:
        """Return minus the kilobytes of each image."""
        return [-_bytes(image) / 1000 for image in images]


def _bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return buffer.tell()
