"""Pictures as ids on disk: extracted once by a tokenizer, trained on many times.

Special here: one parquet file, its rows `ids` (M uint16) and `class_label`; the tokenizer's fingerprint, the codebook
size, the grid and the pictures stand in the file's metadata, so ids of another tokenizer are refused instead
of trained on. The file appears whole or not at all.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from unimm.data.order import EpochOrder
from unimm.errors import UserError, reading
from unimm.evaluation.codebook import CodebookUsage

METADATA_KEY = b"unimm"
LARGEST_CODEBOOK = 2**16  # uint16


@dataclass(frozen=True)
class IdsInfo:
    """What the metadata of a file of ids says; `made_from` says in words which pictures it holds."""

    tokenizer_fingerprint: str
    codebook_size: int
    grid: tuple[int, int]
    made_from: str

    @property
    def num_image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ClassIds:
    """A file of ids in memory: ids [n, M] uint16, class_labels [n] int64."""

    ids: np.ndarray
    class_labels: np.ndarray
    info: IdsInfo

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def entropy(self) -> float:
        """Of the ids' frequencies, in nats: the loss of a model that knows how often each id occurs and nothing
        else."""
        usage = CodebookUsage(self.info.codebook_size)
        usage.update(torch.from_numpy(self.ids.astype(np.int64)))
        return usage.entropy * float(np.log(2))

    def require(self, *, tokenizer_fingerprint: str) -> None:
        """Raise UserError where another tokenizer made the ids."""
        if self.info.tokenizer_fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"These ids were extracted by the tokenizer {self.info.tokenizer_fingerprint[:12]} and the run names "
                f"the tokenizer {tokenizer_fingerprint[:12]}: extract them anew into another folder."
            )

    def require_classes(self, num_classes: int) -> None:
        """Raise UserError where a class lies outside a table of `num_classes`."""
        low, high = int(self.class_labels.min()), int(self.class_labels.max())
        if not 0 <= low <= high < num_classes:
            raise UserError(
                f"The class labels run from {low} to {high} and the model's table from 0 to {num_classes - 1}: set "
                f"model.num_classes to at least {high + 1}, with labels from 0."
            )


class IdStream(Dataset):
    """`length` samples `{"class_labels", "ids"}`, each epoch in a new order; sample n depends on (seed, n) only."""

    def __init__(self, source: ClassIds, length: int, seed: int) -> None:
        self.source = source
        self.length = length
        self.seed = seed
        self.order = EpochOrder(len(source), seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(self.source, self.order.row(index))


class IdRows(Dataset):
    """The samples of a file in its order, for evaluation."""

    def __init__(self, source: ClassIds) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(self.source, index)


def sample(source: ClassIds, row: int) -> dict[str, Any]:
    """One row as the model takes it, before batching."""
    return {"class_labels": int(source.class_labels[row]), "ids": source.ids[row].astype(np.int64)}


# ---- writing and reading ----


def write_ids(path: Path, info: IdsInfo, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write (ids [b, M], class_labels [b]) batch by batch under another name, then rename.

    Raises:
        UserError: an id outside the codebook, a sequence of another length, a codebook too large for 16 bits, or a
            place that cannot be written to.
    """
    import pyarrow as pa  # comes with datasets (the train extra); drawing does without
    import pyarrow.parquet as pq

    if info.codebook_size > LARGEST_CODEBOOK:
        raise UserError(f"Ids are kept in 16 bits: {info.codebook_size} codes are more than {LARGEST_CODEBOOK}.")
    length = info.num_image_tokens
    schema = pa.schema(
        [("ids", pa.list_(pa.uint16(), length)), ("class_label", pa.int64())],
        metadata={METADATA_KEY: json.dumps(asdict(info)).encode()},
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema) as writer:
            for ids, labels in batches:
                _refuse_ids(ids, info, "The tokenizer")
                values = pa.FixedSizeListArray.from_arrays(pa.array(ids.astype(np.uint16).ravel()), length)
                writer.write_table(pa.table([values, pa.array(labels.astype(np.int64))], schema=schema))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write the ids {path}: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_ids(path: Path) -> ClassIds:
    """The file of ids at `path`.

    Raises:
        UserError: it is missing, was not written by `write_ids`, is empty, or holds ids outside the codebook or
            sequences that do not fill the grid.
    """
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"There is no file of ids {path}.")
    with reading("The file of ids", path):
        table = pq.read_table(path)
    described = (table.schema.metadata or {}).get(METADATA_KEY)
    if described is None:
        raise UserError(f"{path} does not say which tokenizer made it: extract the ids anew.")
    with reading("The file of ids", path):
        fields = json.loads(described)
        info = IdsInfo(**fields | {"grid": tuple(fields["grid"])})
        column = table["ids"].combine_chunks()
        ids = column.values.to_numpy().reshape(len(table), -1) if len(table) else np.empty((0, 0), np.uint16)
        labels = table["class_label"].to_numpy()
    if not len(table):
        raise UserError(f"{path} holds no ids.")
    _refuse_ids(ids, info, str(path))
    return ClassIds(ids, labels, info)


def _refuse_ids(ids: np.ndarray, info: IdsInfo, whose: str) -> None:
    if ids.shape[1] != info.num_image_tokens:
        rows, columns = info.grid
        raise UserError(
            f"{whose} gives sequences of {ids.shape[1]} ids, and a grid of {rows} x {columns} takes {rows * columns}."
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < info.codebook_size:
        raise UserError(
            f"{whose} gives ids from {ids.min()} to {ids.max()}, and the codebook runs from 0 to "
            f"{info.codebook_size - 1}."
        )
