"""Images with class labels: parquet files with a label column, and a labelled subset of the shapes data set."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from unimm.data.held_out import PartOfRows
from unimm.data.shapes.prompts import Split
from unimm.data.shapes.world import SHAPES, render, sample_scene
from unimm.data.sources.storage import data_path
from unimm.data.sources.tables import parquet_images
from unimm.errors import UserError

LABEL = "label"


class LabelledImages(Dataset):
    """A data set of the first `count` rows (None: all) of a parquet file as `{"image": PIL RGB, "label": int}`.

    Args:
        part: (held-out share, "train" or "test"), the part of the rows to use; None takes all.

    Raises:
        UserError: there is no such file, no integer column `label`, or fewer than `count` rows.
    """

    def __init__(self, source: str, count: int | None = None, part: tuple[float, Split] | None = None) -> None:
        images = parquet_images([data_path(source)])
        names = images.table.column_names
        if LABEL not in names:
            raise UserError(f"{source} has no column {LABEL!r}; its columns are {', '.join(names)}.")
        self.rows = PartOfRows(images, *part, source) if part else images
        chosen = [self.rows.number(n) for n in range(len(self.rows))[:count]]
        labels = np.asarray(images.table[LABEL])[chosen]
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"The column {LABEL!r} of {source} holds {labels.dtype}, not whole numbers.")
        if count is not None and len(labels) < count:
            raise UserError(f"{source} holds {len(labels)} images and {count} are asked for.")
        self.labels = labels.astype(np.int64)  # [n]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"image": self.rows[index]["image"], "label": int(self.labels[index])}


class LabelledShapes(Dataset):
    """A data set of `length` single-object scenes, whose shape is the class (0 to 5); scene n depends only on
    (seed, n)."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        scene = sample_scene(np.random.default_rng((self.seed, index)), num_objects=1, allow_withheld=True)
        return {"image": render(scene), "label": SHAPES.index(scene.objects[0].shape)}


def labelled_images(
    source: str, count: int | None = None, *, seed: int = 0, part: tuple[float, Split] | None = None
) -> LabelledImages | LabelledShapes:
    """Open the labelled images of `source`: a parquet file, or "shapes" with a `count` and a seed.

    Raises:
        UserError: the source cannot be read, has no labels, or has fewer than `count` images.
    """
    if source != "shapes":
        return LabelledImages(source, count, part)
    if count is None:
        raise UserError("The shapes data set has no end: say how many images of it are wanted.")
    return LabelledShapes(count, seed)
