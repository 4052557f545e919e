"""Image sets for evaluation.

A set never repeats an image, and never resizes or skips one
silently: an unreadable image raises an error that names it, or, in a long run, is reported to the caller's `bad`
callback.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unimm.data.shapes.datasets import ShapesImages
from unimm.data.shuffling import EpochOrder
from unimm.data.sources.folders import FolderImages
from unimm.data.sources.registry import open_images
from unimm.data.sources.storage import data_path
from unimm.errors import UserError, one_line, printable
from unimm.evaluation.runs.records import UNREADABLE, content_sha256
from unimm.runs.provenance import file_sha256

Bad = Callable[[str, UserError], None]
"""A callback for an image that cannot be read: its name, and the error."""


@dataclass(frozen=True)
class ImageSet:
    """A set of named images; a name is a path inside a folder, or a row number. `load` takes an index into `names`."""

    load: Callable[[int], Image.Image]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def batches(
        self, size: int, wanted: Callable[[Sequence[str]], bool] = bool, bad: Bad | None = None
    ) -> Iterator[list[tuple[str, Image.Image]]]:
        """Yield batches of `size` (name, image) pairs, in order; a batch whose names are not `wanted` is not read.

        Args:
            bad: called for each image that cannot be read, which is left out; without it, the error is raised.
        """
        for start in range(0, len(self), size):
            names = self.names[start : start + size]
            if not wanted(names):
                continue
            batch = []
            for index, name in enumerate(names, start):
                try:
                    batch.append((name, self.load(index)))
                except UserError as error:
                    if bad is None:
                        raise
                    bad(name, error)
            if batch:
                yield batch


def image_set(source: str, count: int | None = None, seed: int | None = None) -> ImageSet:
    """Open the images of "shapes", a parquet file, a folder, or the ADM evaluator's npz, without repetition.

    Args:
        source: as in the recipes' `data.source`, or a file that ends in .npz.
        count: number of images; None takes all.
        seed: seed of a random subset; None takes the first images, by name.

    Raises:
        UserError: the source cannot be read, or holds fewer than `count` images.
    """
    if source == "shapes":
        if count is None:
            raise UserError("The shapes data set has no end: say how many images.")
        world = ShapesImages(count, seed or 0, allow_withheld=True)
        return ImageSet(lambda i: world[i]["image"], [_row_name(i) for i in range(count)])
    load, names = _opened(data_path(source))
    if len(names) < (count or 1):
        raise UserError(f"{source} holds {len(names)} images and {count or 1} are asked for.")
    order = None if seed is None else EpochOrder(len(names), seed)
    rows = [i if order is None else order.row(i) for i in range(len(names) if count is None else count)]
    return ImageSet(lambda i: load(rows[i]), [names[row] for row in rows])


def source_sha256(source: str, count: int | None = None, seed: int | None = None) -> str:
    """Compute the sha256 of everything that `image_set` with these arguments would read: names and contents.

    Files are streamed, not decoded; for shards in a folder or on the hub, every image is decoded. An npz with images or
    statistics is hashed as a file.

    Raises:
        UserError: as `image_set`.
    """
    path = data_path(source)
    if path.suffix == ".npz" and path.is_file():
        return content_sha256([file_sha256(path), count, seed])
    images = image_set(source, count, seed)
    if source == "shapes":
        return content_sha256([seed, *images.names])
    if path.is_file():
        return content_sha256([file_sha256(path), *images.names])
    files = [path / name for name in images.names]
    if all(file.is_file() for file in files):
        return content_sha256([name, file_sha256(file)] for name, file in zip(images.names, files, strict=True))
    return content_sha256([name, *_looked_at(images, i)] for i, name in enumerate(images.names))


def _looked_at(images: ImageSet, index: int) -> tuple[int, int, str]:
    try:
        image = images.load(index)
    except UserError:
        return (0, 0, UNREADABLE)
    return (*image.size, hashlib.sha256(image.tobytes()).hexdigest())


def read_images_npz(path: Path) -> np.ndarray:
    """Read `arr_0` of the ADM evaluator's file, uint8 [N, H, W, 3]. Raises UserError for anything else."""
    array = read_npz(path).get("arr_0")
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        found = "no arr_0" if array is None else f"arr_0 of {array.dtype} {list(array.shape)}"
        raise UserError(f"{path} holds {found}; images stand in arr_0, uint8 [N, H, W, 3].")
    return array


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file without unpickling. Raises UserError if it is not one."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an npz file: {one_line(error)[:200]}.") from error


def _opened(path: Path) -> tuple[Callable[[int], Image.Image], list[str]]:
    if path.suffix == ".npz":
        array = read_images_npz(path)
        return lambda i: Image.fromarray(array[i]), [_row_name(i) for i in range(len(array))]
    images = open_images(path)
    if isinstance(images, FolderImages):
        names = [printable(found.relative_to(path).as_posix()) for found in images.paths]
    else:
        names = [_row_name(i) for i in range(len(images))]
    return lambda i: images[i]["image"], names


def _row_name(row: int) -> str:
    return f"{row:06d}"
