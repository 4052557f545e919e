"""Picture streams for training and evaluation: the picture world, parquet files, or a folder of pictures.

Special here: a stream has no epochs to the outside. Item n is a pure function of (seed, n), including the shuffle, crop
and flip, so the number of pictures seen is all there is to know of a run's data position.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from unimm.data.images import load_image
from unimm.data.order import EpochOrder
from unimm.data.shapes.datasets import ShapesPictures
from unimm.errors import UserError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class PictureConfig:
    """`source`: "shapes", a .parquet file (columns image and, for captions, text) or a folder of pictures.

    `$UNIMM_DATA` in the source is replaced by that variable (default ../shared). `random_crop` and `flip` are the
    augmentation of VQRAE's table 7; without them the centre is cut out.
    """

    source: str = "shapes"
    image_size: int = 64
    random_crop: bool = False
    flip: bool = False
    caption_template: str = "{}"


class Pictures(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def data_path(source: str) -> Path:
    """`source` with `$UNIMM_DATA` filled in (default ../shared)."""
    return Path(source.replace("$UNIMM_DATA", os.environ.get("UNIMM_DATA", "../shared")))


class ParquetPictures(Dataset):
    """The rows of one parquet file as `{"image": PIL RGB, "text": str}`; rows without a text column have an empty
    text."""

    def __init__(self, path: Path) -> None:
        from datasets import Dataset as Table  # the train extra: heavy, and not needed for the picture world
        from datasets.exceptions import DatasetGenerationError

        if not path.is_file():
            raise UserError(f"There is no parquet file {path}; set $UNIMM_DATA to the folder that holds the data.")
        try:
            self.table = Table.from_parquet(str(path), cache_dir=os.environ.get("UNIMM_CACHE"))
        except (DatasetGenerationError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable parquet file: {error}.") from error
        if "image" not in self.table.column_names:
            raise UserError(f"{path} has no column 'image'; its columns are {', '.join(self.table.column_names)}.")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        return {"image": flatten(row["image"]), "text": row.get("text", "")}


class FolderPictures(Dataset):
    """Every picture below a folder, in the order of its path."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
        if not self.paths:
            raise UserError(f"{folder} holds no picture ({', '.join(PICTURE_SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": load_image(self.paths[index]), "text": ""}


def flatten(image: Image.Image) -> Image.Image:
    """RGB, transparency over white."""
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


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
    """`length` augmented pictures drawn from `pictures`, each epoch in a new order."""

    def __init__(self, pictures: Pictures, config: PictureConfig, length: int, seed: int) -> None:
        self.pictures = pictures
        self.config = config
        self.length = length
        self.seed = seed
        self.order = EpochOrder(len(pictures), seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.pictures[self.order.row(index)]
        rng = np.random.default_rng((self.seed, 1, index))
        offset = rng.random(2).tolist() if self.config.random_crop else (0.5, 0.5)
        image = crop(row["image"], self.config.image_size, offset)
        if self.config.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": image, "text": self.config.caption_template.format(row["text"])}


def picture_stream(config: PictureConfig, length: int, seed: int, *, allow_withheld: bool = True) -> Pictures:
    """`length` pictures from `config.source`. Raises UserError where the source cannot be read."""
    if config.source == "shapes":
        return ShapesPictures(length, seed, allow_withheld)
    return PictureStream(open_pictures(data_path(config.source)), config, length, seed)


def open_pictures(path: Path) -> Pictures:
    """The pictures of a folder or a parquet file. Raises UserError where it cannot be read."""
    return FolderPictures(path) if path.is_dir() else ParquetPictures(path)
