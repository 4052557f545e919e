"""Pictures with a class: labelled parquet files, and a labelled corner of the picture world that needs no file."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from unimm.data.held_out import PartOfRows
from unimm.data.shapes.prompts import Split
from unimm.data.shapes.world import SHAPES, render, sample_scene
from unimm.data.sources.storage import data_path
from unimm.data.sources.tables import parquet_pictures
from unimm.errors import UserError

LABEL = "label"


class LabelledPictures(Dataset):
    """The first `count` rows (None: all) of a parquet file as `{"image": PIL RGB, "label": int}`.

    Args:
        part: which rows of the file: (share that is held out, "train" or "test"); None takes all.

    Raises:
        UserError: no such file, no column `label` of whole numbers, or fewer rows than asked for.
    """

    def __init__(self, source: str, count: int | None = None, part: tuple[float, Split] | None = None) -> None:
        pictures = parquet_pictures([data_path(source)])
        names = pictures.table.column_names
        if LABEL not in names:
            raise UserError(f"{source} has no column {LABEL!r}; its columns are {', '.join(names)}.")
        self.rows = PartOfRows(pictures, *part, source) if part else pictures
        chosen = [self.rows.number(n) for n in range(len(self.rows))[:count]]
        labels = np.asarray(pictures.table[LABEL])[chosen]
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"The column {LABEL!r} of {source} holds {labels.dtype}, not whole numbers.")
        if count is not None and len(labels) < count:
            raise UserError(f"{source} holds {len(labels)} pictures and {count} are asked for.")
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


def labelled_pictures(
    source: str, count: int | None = None, *, seed: int = 0, part: tuple[float, Split] | None = None
) -> LabelledPictures | LabelledShapes:
    """The labelled pictures of `source`: a parquet file, or "shapes" with a `count` and a seed.

    Raises:
        UserError: the source cannot be read, has no labels, or holds fewer than `count` pictures.
    """
    if source != "shapes":
        return LabelledPictures(source, count, part)
    if count is None:
        raise UserError("The picture world has no end: say how many pictures of it are wanted.")
    return LabelledShapes(count, seed)
