"""Picture streams for training and evaluation: the picture world, or pictures from anywhere (`unimm.data.sources`).

Special here: a stream has no epochs to the outside. Item n is a pure function of (seed, n), including the shuffle, crop
and flip, so the number of pictures seen is all there is to know of a run's data position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from unimm.data.order import Interleaving, Rows, order_of
from unimm.data.reading import ReadOptions
from unimm.data.shapes.datasets import ShapesPictures
from unimm.data.skipping import DEFAULT_MAX_BAD_SHARE, UsableRows
from unimm.data.sources import open_pictures
from unimm.errors import UserError
from unimm.typed import used_when

WORLD = "shapes"


@dataclass
class PictureSource:
    """One of several sources that are mixed: pictures come from it at the share weight / all weights."""

    source: str
    weight: float = 1.0
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass
class PictureConfig:
    """Pictures, and captions where there are some.

    Args:
        source: "shapes", or what `unimm.data.sources` reads: a folder, parquet files, tar shards, hub:owner/name.
            `$UNIMM_DATA` in it is replaced by that variable (default ../shared).
        read: how the source is read and filtered.
        mix: several sources with their weights, in the place of `source` and `read`.
        max_bad_share: share of a source's rows that may be damaged before the run stops.
        image_size: side of the pictures, cut out of the centre.
        random_crop, flip: the augmentation of VQRAE's table 7.
        caption_template: what a caption is put into.
    """

    source: str = WORLD
    image_size: int = 64
    random_crop: bool = False
    flip: bool = False
    caption_template: str = "{}"
    read: ReadOptions = field(
        default_factory=ReadOptions, metadata=used_when(lambda c: c.source != WORLD, "data.source from outside")
    )
    mix: list[PictureSource] = field(default_factory=list)
    max_bad_share: float = field(
        default=DEFAULT_MAX_BAD_SHARE,
        metadata=used_when(lambda c: c.source != WORLD or c.mix, "data.source or data.mix from outside"),
    )

    def __post_init__(self) -> None:
        if any(each.weight <= 0 for each in self.mix):
            raise UserError("data.mix: every weight must be above 0.")
        if self.mix and self.source != WORLD:
            raise UserError(f"Give either data.source ({self.source}) or data.mix ({len(self.mix)} sources).")

    @property
    def sources(self) -> list[PictureSource]:
        return self.mix or [PictureSource(self.source, read=self.read)]


class Pictures(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def to_array(images: Sequence[Image.Image]) -> np.ndarray:
    """RGB pictures of one size as uint8 [B, H, W, 3]."""
    return np.stack([np.asarray(image) for image in images])


def crop(image: Image.Image, size: int, offset: Sequence[float] = (0.5, 0.5)) -> Image.Image:
    """The short side resized to `size` (bicubic), then a square cut out at `offset` (0 = left/top, 1 =
    right/bottom)."""
    width, height = image.size
    scale = size / min(width, height)
    if scale != 1:
        image = image.resize(
            (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
        )
    left, top = (round(o * (side - size)) for o, side in zip(offset, image.size, strict=True))
    return image.crop((left, top, left + size, top + size))


class PictureStream(Dataset):
    """`length` augmented pictures drawn from `sources`, each at its weight and each pass over it in a new order."""

    def __init__(
        self,
        sources: Sequence[Rows],
        config: PictureConfig,
        length: int,
        seed: int,
    ) -> None:
        self.sources = sources
        self.config = config
        self.length = length
        self.seed = seed
        self.mixed = Interleaving([each.weight for each in config.sources])
        self.orders = [order_of(rows, seed, 2 * k) for k, rows in enumerate(sources)]

    @property
    def sizes(self) -> dict[str, int]:
        """{source: its rows}: with other numbers item n is another one."""
        sources = zip(self.config.sources, self.sources, strict=True)
        return {each.source: len(rows) for each, rows in sources if each.source != WORLD}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        k, rank = self.mixed.place(index)
        row = self.sources[k][self.orders[k].row(rank)]
        rng = np.random.default_rng((self.seed, 1, index))
        offset = rng.random(2).tolist() if self.config.random_crop else (0.5, 0.5)
        image = crop(row["image"], self.config.image_size, offset)
        if self.config.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": image, "text": self.config.caption_template.format(row["text"])}


def picture_stream(
    config: PictureConfig, length: int, seed: int, *, allow_withheld: bool = True, log_folder: Path | None = None
) -> PictureStream | ShapesPictures:
    """`length` pictures from the configuration's sources.

    Args:
        allow_withheld: whether the picture world shows what it keeps for tests.
        log_folder: where skipped rows are named, one file for each source.

    Raises:
        UserError: a source cannot be read.
    """

    def world() -> ShapesPictures:
        return ShapesPictures(length, seed, allow_withheld)

    if not config.mix and config.source == WORLD:
        return world()
    sources = [
        world() if each.source == WORLD else _usable(each, config, log_folder and log_folder / f"pictures-{k}.jsonl")
        for k, each in enumerate(config.sources)
    ]
    return PictureStream(sources, config, length, seed)


def _usable(source: PictureSource, config: PictureConfig, log: Path | None) -> UsableRows:
    rows = open_pictures(source.source, source.read)
    return UsableRows(rows, source.source, max_bad_share=config.max_bad_share, log=log)
