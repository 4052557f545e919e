"""Images with a class: labelled parquet files, and a labelled corner of the shapes data set that needs no file."""

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
    """The first `count` rows (None: all) of a parquet file as `{"image": PIL RGB, "label": int}`.

    Args:
        part: which rows of the file: (share that is held out, "train" or "test"); None takes all.

    Raises:
        UserError: no such file, no column `label` of whole numbers, or fewer rows than asked for.
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
    """`length` scenes of one object, whose shape is the class (0 to 5); scene n depends on (seed, n) only."""

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
    """The labelled images of `source`: a parquet file, or "shapes" with a `count` and a seed.

    Raises:
        UserError: the source cannot be read, has no labels, or holds fewer than `count` images.
    """
    if source != "shapes":
        return LabelledImages(source, count, part)
    if count is None:
        raise UserError("The shapes data set has no end: say how many images of it are wanted.")
    return LabelledShapes(count, seed)
