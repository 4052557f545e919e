"""Image streams for training and evaluation: the shapes data set, or external images (`unimm.data.sources`).

A stream exposes no epochs. Item n is a pure function of (seed, n), including the shuffle, crop and flip, so the number
of images seen is the whole data state of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from unimm.config.schema import Count, Range, Rate, Share, used_when
from unimm.data.bad_rows import DEFAULT_MAX_BAD_SHARE, UsableRows
from unimm.data.held_out import DEFAULT_SHARE, HeldOut, PartOfRows, check_share, refuse_overlaps
from unimm.data.resizing import crop
from unimm.data.shapes.datasets import ShapesImages
from unimm.data.shapes.prompts import Split
from unimm.data.shuffling import Interleaving, Rows, order_of
from unimm.data.sources.registry import open_images
from unimm.data.sources.rows import ReadOptions
from unimm.errors import UserError

WORLD = "shapes"


@dataclass
class ImageSource:
    """One source of a mix, sampled with the share weight / sum of weights."""

    source: str
    weight: Rate = 1.0
    eval_source: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass
class ImageDataConfig:
    """Configuration of image data, with captions if the source has any.

    Args:
        source: "shapes", or what `unimm.data.sources` reads: a folder, parquet files, tar shards, hub:owner/name.
            `$UNIMM_DATA` in it is replaced by that variable (default ../shared).
        read: how the source is read and filtered.
        eval_source: images for evaluation only, never trained on; None holds out the share `eval_share` of the rows of
            `source`, by the rule of `unimm.data.held_out`, so that every recipe holds out the same rows.
        mix: several sources with their weights, instead of `source`, `eval_source` and `read`.
        max_bad_share: share of a source's rows that may be damaged before the run stops.
        image_size: side of the center-cropped images, in pixels.
        random_crop, flip: the augmentation of VQRAE's table 7.
        caption_template: format string that a caption is inserted into.
    """

    source: str = WORLD
    image_size: Count = 64
    random_crop: bool = False
    flip: bool = False
    caption_template: str = "{}"
    read: ReadOptions = field(
        default_factory=ReadOptions, metadata=used_when(lambda c: c.source != WORLD, "data.source from outside")
    )
    mix: list[ImageSource] = field(default_factory=list)
    max_bad_share: Share = field(
        default=DEFAULT_MAX_BAD_SHARE,
        metadata=used_when(lambda c: c.source != WORLD or c.mix, "data.source or data.mix from outside"),
    )
    eval_source: str | None = None
    eval_share: Annotated[float, Range(least=0, most=0.5)] = DEFAULT_SHARE

    def __post_init__(self) -> None:
        check_share(self.eval_share)
        if any(each.weight <= 0 for each in self.mix):
            raise UserError("data.mix: every weight must be above 0.")
        if self.mix and self.source != WORLD:
            raise UserError(f"Give either data.source ({self.source}) or data.mix ({len(self.mix)} sources).")
        if self.eval_source is not None and (self.mix or WORLD in (self.source, self.eval_source)):
            raise UserError(
                "data.eval_source goes with data.source from outside; each source of data.mix has one of its own."
            )

    @property
    def sources(self) -> list[ImageSource]:
        return self.mix or [ImageSource(self.source, eval_source=self.eval_source, read=self.read)]

    def refuse_overlaps(self) -> None:
        """Raise UserError if one source trains on rows that another source holds out."""
        outside = [each for each in self.sources if each.source != WORLD]
        refuse_overlaps(
            [(each.read.named(each.source), each.eval_source is None and self.eval_share > 0) for each in outside],
            [each.read.named(each.eval_source) for each in outside if each.eval_source is not None],
        )


class Images(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def to_array(images: Sequence[Image.Image]) -> np.ndarray:
    """Stack RGB images of one size as uint8 [B, H, W, 3]."""
    return np.stack([np.asarray(image) for image in images])


class ImageStream(Dataset):
    """A dataset of `length` augmented images from `sources`, mixed by weight and reshuffled in every epoch."""

    def __init__(
        self,
        sources: Sequence[Rows],
        config: ImageDataConfig,
        length: int,
        seed: int,
        chosen: Sequence[ImageSource] | None = None,
    ) -> None:
        """Initialize from `sources`, the rows of the `chosen` sources of the configuration (None: all)."""
        self.sources = sources
        self.config = config
        self.length = length
        self.seed = seed
        self.chosen = config.sources if chosen is None else chosen
        self.mixed = Interleaving([each.weight for each in self.chosen])
        # Even salts only: (seed, 1, index) seeds the augmentation in `__getitem__`.
        self.orders = [order_of(rows, seed, 2 * k) for k, rows in enumerate(sources)]

    @property
    def sizes(self) -> dict[str, int]:
        """Return {source: number of rows}: if one changes, item n changes."""
        sources = zip(self.chosen, self.sources, strict=True)
        return {each.source: len(rows) for each, rows in sources if each.source != WORLD}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        k, rank = self.mixed.place(index)
        row = self.sources[k][self.orders[k].row(rank)]
        rng = np.random.default_rng((self.seed, 1, index))  # per item, so resuming does not replay earlier items
        offset = rng.random(2).tolist() if self.config.random_crop else (0.5, 0.5)
        image = crop(row["image"], self.config.image_size, offset)
        if self.config.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": image, "text": self.config.caption_template.format(row["text"])}


def image_stream(
    config: ImageDataConfig, length: int, seed: int, *, allow_withheld: bool = True, log_folder: Path | None = None
) -> ImageStream | ShapesImages:
    """Open the training stream: `length` images from the configuration's sources.

    Args:
        allow_withheld: whether the shapes data set includes the pairs withheld for tests.
        log_folder: folder of the logs of skipped rows, one file for each source.

    Raises:
        UserError: a source cannot be read.
    """

    def world() -> ShapesImages:
        return ShapesImages(length, seed, allow_withheld)

    if not config.mix and config.source == WORLD:
        return world()
    config.refuse_overlaps()
    sources = [
        world()
        if each.source == WORLD
        else _usable(each, config, "train", log_folder and log_folder / f"images-{k}.jsonl")
        for k, each in enumerate(config.sources)
    ]
    return ImageStream(sources, config, length, seed)


def held_out_images(config: ImageDataConfig, length: int, seed: int) -> ImageStream | None:
    """Open a stream of `length` held-out images, which `image_stream` never returns, without random crop and flip.

    Returns None if nothing is held out: for shapes, for a source of one row, or if `eval_share` is 0.
    """
    outside = [each for each in config.sources if each.source != WORLD]
    parts = [(each, _usable(each, config, "test")) for each in outside if _holds_out(each, config)]
    if not parts:
        return None
    plain = replace(config, random_crop=False, flip=False)
    return ImageStream([rows for _, rows in parts], plain, length, seed, [each for each, _ in parts])


def held_out_lines(train: ImageStream | ShapesImages, test: ImageStream | None) -> list[str]:
    """Return one line for each external source: how many rows are trained on and how many are held out."""
    held_out = {} if test is None else test.sizes
    return [
        f"{source}: {rows} rows to train on, {held_out.get(source, 0)} held out" for source, rows in train.sizes.items()
    ]


def _holds_out(source: ImageSource, config: ImageDataConfig) -> bool:
    if source.eval_source is not None:
        return True
    return HeldOut(len(open_images(source.source, source.read)), config.eval_share).count("test") > 0


def _usable(source: ImageSource, config: ImageDataConfig, split: Split, log: Path | None = None) -> UsableRows:
    own = split == "test" and source.eval_source is not None
    place = str(source.eval_source) if own else source.source
    rows = open_images(place, source.read, strict=not own)
    if source.eval_source is None:
        rows = PartOfRows(rows, config.eval_share, split, place)
    whose = f"{place} (held-out rows)" if split == "test" else place
    usable = UsableRows(rows, whose, max_bad_share=config.max_bad_share, log=log)
    usable.require_usable()
    return usable
