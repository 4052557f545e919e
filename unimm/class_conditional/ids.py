"""Data sets of image ids with class labels, in memory (on disk: `unimm.data.sources.ids`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from unimm.data.shuffling import EpochOrder
from unimm.data.sources.ids import IdsInfo, IdsManifest, read_ids, unigram_entropy, write_ids
from unimm.errors import UserError

LABEL = "class_label"


@dataclass(frozen=True)
class ClassIds:
    """The contents of a file of ids: ids [n, M] uint16, class_labels [n] int64."""

    ids: np.ndarray
    class_labels: np.ndarray
    info: IdsInfo

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def entropy(self) -> float:
        """Compute the entropy of the ids' frequencies, in nats."""
        return unigram_entropy([self.ids], self.info.codebook_size)

    def require_classes(self, num_classes: int) -> None:
        """Raise UserError if a class label is outside 0..num_classes - 1."""
        low, high = int(self.class_labels.min()), int(self.class_labels.max())
        if not 0 <= low <= high < num_classes:
            raise UserError(
                f"The class labels run from {low} to {high} and the model's table from 0 to {num_classes - 1}: set "
                f"model.num_classes to at least {high + 1}, with labels from 0."
            )


def write_class_ids(path: Path, info: IdsInfo, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write (ids [b, M], class_labels [b]) batch by batch; see `write_ids`."""
    write_ids(path, info, ({"ids": ids, LABEL: labels} for ids, labels in batches), [LABEL])


def read_class_ids(path: Path) -> ClassIds:
    """Read the file of ids at `path`; see `read_ids`. Raises UserError if it has no class labels."""
    ids, others, info = read_ids(path)
    if LABEL not in others:
        raise UserError(f"{path} holds ids without classes: extract them anew from labelled images.")
    return ClassIds(ids, others[LABEL].astype(np.int64), info)


def read_class_ids_folder(folder: str) -> ClassIds:
    """Read all shards of a folder of ids (`recipes/encode.py` with data.columns: [class_label]) into memory.

    Raises:
        UserError: encoding has not finished, the ids have no class labels, or a shard is missing or of another run.
    """
    manifest = IdsManifest.read(folder)
    if LABEL not in manifest.columns:
        raise UserError(f"{folder} holds ids without classes: encode them with data.columns: [{LABEL}].")
    parts = [read_class_ids(Path(folder) / shard["name"]) for shard in manifest.shards if shard["rows"]]
    if other := [part for part in parts if part.info != manifest.info]:
        raise UserError(f"A shard of {folder} holds ids of {other[0].info.made_from}, not of its manifest's run.")
    ids, labels = ([getattr(part, name) for part in parts] for name in ("ids", "class_labels"))
    return ClassIds(np.concatenate(ids), np.concatenate(labels), manifest.info)


class IdStream(Dataset):
    """`length` samples `{"class_labels", "ids"}`, reshuffled each epoch; sample n depends on (seed, n) only."""

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
    """A dataset of a file's samples in their order, for evaluation."""

    def __init__(self, source: ClassIds) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(self.source, index)


def sample(source: ClassIds, row: int) -> dict[str, Any]:
    """Return one row as the model's keyword arguments, before batching."""
    return {"class_labels": int(source.class_labels[row]), "ids": source.ids[row].astype(np.int64)}
