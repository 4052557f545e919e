"""Image token ids on disk: images encoded once by an image tokenizer, for many training runs.

    FOLDER/manifest.json            list of the shards and their numbers of rows; written last (`recipes/encode.py`)
    FOLDER/ids-00000.parquet        columns `ids` (M uint16), and `text`, `key`, `class_label` if they are known

Every file's metadata holds the tokenizer's fingerprint, the codebook size, the grid and a description of the images, so
ids of another tokenizer are rejected instead of trained on. Files are written atomically. Text-to-image training reads
folders of shards (`IdsFolder`), class-conditional training one file (`unimm.class_conditional.ids`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimm.data.shuffling import Rows
from unimm.data.sources.row_groups import RowGroups
from unimm.data.sources.storage import filled, opened_place, reaching
from unimm.errors import UserError, reading
from unimm.runs.provenance import appearing

METADATA_KEY = b"unimm"
LARGEST_CODEBOOK = 2**16  # uint16
MANIFEST = "manifest.json"
COLUMNS = ("text", "key", "class_label")
"""Optional columns next to the ids."""
POOLED_ROWS = 65_536
"""Number of rows that are shuffled together and kept in memory: 128 MB at 1024 ids."""


@dataclass(frozen=True)
class IdsInfo:
    """Metadata of a file of ids; `made_from` describes the encoded images."""

    tokenizer_fingerprint: str
    codebook_size: int
    grid: tuple[int, int]
    made_from: str

    @property
    def num_image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def require(self, *, tokenizer_fingerprint: str) -> None:
        """Raise UserError, naming both, if another tokenizer produced the ids."""
        if self.tokenizer_fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"These ids were extracted by the tokenizer {self.tokenizer_fingerprint[:12]} and the run names "
                f"the tokenizer {tokenizer_fingerprint[:12]}: extract them anew into another folder."
            )

    def refuse_ids(self, ids: np.ndarray, whose: str) -> None:
        """Raise UserError if ids [n, M] do not fill the grid or are outside the codebook."""
        if ids.shape[1] != self.num_image_tokens:
            rows, columns = self.grid
            raise UserError(
                f"{whose} gives sequences of {ids.shape[1]} ids, and a grid of {rows} x {columns} takes "
                f"{rows * columns}."
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.codebook_size:
            raise UserError(
                f"{whose} gives ids from {ids.min()} to {ids.max()}, and the codebook runs from 0 to "
                f"{self.codebook_size - 1}."
            )


def unigram_entropy(parts: Iterable[np.ndarray], codebook_size: int) -> float:
    """Compute the entropy of the id frequencies, in nats: the loss of a model that knows only these frequencies."""
    counts = sum(
        (np.bincount(ids.ravel(), minlength=codebook_size) for ids in parts), np.zeros(codebook_size, np.int64)
    )
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def entropy_line(sequences: int, entropy: float, codebook_size: int) -> str:
    """Format the line that a run on ids logs at its start."""
    uniform = float(np.log(codebook_size))
    return f"{sequences} sequences of ids; unigram entropy {entropy:.3f} nats an id, ln K {uniform:.3f}"


# ---- one file ----


def write_ids(path: Path, info: IdsInfo, batches: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write batches of {"ids": [b, M]} and `columns` [b] to a temporary file, then rename it to `path`.

    Raises:
        UserError: an id is outside the codebook, a sequence has another length, the codebook is too large for 16 bits,
            or the path cannot be written to.
    """
    import pyarrow as pa  # comes with datasets (the train extra); not needed for generation
    import pyarrow.parquet as pq

    if info.codebook_size > LARGEST_CODEBOOK:
        raise UserError(f"Ids are kept in 16 bits: {info.codebook_size} codes are more than {LARGEST_CODEBOOK}.")
    length = info.num_image_tokens
    types = {name: pa.int64() if name == "class_label" else pa.string() for name in columns}
    schema = pa.schema(
        [("ids", pa.list_(pa.uint16(), length)), *types.items()],
        metadata={METADATA_KEY: json.dumps(asdict(info)).encode()},
    )
    with appearing(path, "ids") as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for batch in batches:
            info.refuse_ids(batch["ids"], "The tokenizer")
            values = pa.array(batch["ids"].astype(np.uint16).ravel())
            others = [pa.array(batch[name], type=kind) for name, kind in types.items()]
            writer.write_table(pa.table([pa.FixedSizeListArray.from_arrays(values, length), *others], schema=schema))


def read_ids(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], IdsInfo]:
    """Read the ids [n, M] uint16 of the file at `path`, its other columns and its metadata.

    Raises:
        UserError: the file is missing, was not written by `write_ids`, is empty, or has ids outside the codebook or
            sequences that do not fill the grid.
    """
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"There is no file of ids {path}.")
    with reading("The file of ids", path):
        table = pq.read_table(path)
    info = info_of(table.schema.metadata, path)
    with reading("The file of ids", path):
        ids = _ids_of(table) if len(table) else np.empty((0, 0), np.uint16)
        others = {name: table[name].to_numpy() for name in table.column_names if name != "ids"}
    if not len(table):
        raise UserError(f"{path} holds no ids.")
    info.refuse_ids(ids, str(path))
    return ids, others, info


def info_of(metadata: Mapping[bytes, bytes] | None, path: str | Path) -> IdsInfo:
    """Parse the `IdsInfo` from a parquet file's metadata. Raises UserError if there is none."""
    described = (metadata or {}).get(METADATA_KEY)
    if described is None:
        raise UserError(f"{path} does not say which tokenizer made it: extract the ids anew.")
    with reading("The file of ids", path):
        return _info(json.loads(described))


def _info(fields: dict[str, Any]) -> IdsInfo:
    return IdsInfo(**fields | {"grid": tuple(fields["grid"])})


def _ids_of(table: Any) -> np.ndarray:
    """Return the column `ids` of an Arrow table as [n, M]."""
    return table["ids"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


# ---- a folder of shards ----


@dataclass(frozen=True)
class IdsManifest:
    """Manifest of a folder of ids: their info, unigram entropy in nats, columns, and the shards in order as
    {"name", "rows", "skipped": {reason: rows of the source}}."""

    info: IdsInfo
    unigram_entropy: float
    columns: list[str]
    shards: list[dict[str, Any]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: str) -> "IdsManifest":
        """Read the manifest of a folder. Raises UserError if encoding has not finished or the file cannot be read."""
        place = f"{folder}/{MANIFEST}"
        with reaching(place):
            fs, path = opened_place(place)
            if not fs.exists(path):
                count = len(fs.glob(path.replace(MANIFEST, "ids-*.parquet")))
                raise UserError(
                    f"{folder} holds {count} shards of ids and no {MANIFEST}: encode.py did not come to its end; start "
                    "it again, it goes on with the missing shards."
                )
            text = fs.cat_file(path)
        with reading("The manifest", place):
            fields = json.loads(text)
            return cls(**fields | {"info": _info(fields["info"])})


def holds_ids(source: str) -> bool:
    """Return whether `source` is a folder of ids, finished or not."""
    folder = Path(filled(source))
    return folder.is_dir() and any(folder.glob("ids-*.parquet"))


class IdsFolder(Rows):
    """A data set of the concatenated shards of a folder; rows are {"ids": [M] int64} and the other columns.

    Raises:
        UserError: encoding has not finished; a shard is missing, has another length than the manifest says, or is from
            another tokenizer.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.manifest = folder, IdsManifest.read(folder)
        self.info, self.entropy = self.manifest.info, self.manifest.unigram_entropy
        shards = self.manifest.shards
        places = [f"{folder}/{shard['name']}" for shard in shards]
        self.groups = RowGroups(places, folder, pooled_rows=POOLED_ROWS)
        for place, shard, rows, metadata in zip(
            places, shards, self.groups.file_rows, self.groups.file_metadata, strict=True
        ):
            if rows != shard["rows"]:
                raise UserError(f"{place} holds {rows} rows and {MANIFEST} says {shard['rows']}: encode it again.")
            if info_of(metadata, place) != self.info:
                raise UserError(f"{place} was made by another run than {MANIFEST} says: encode it again.")
        self.blocks, self.pool, self.column_names = self.groups.blocks, self.groups.pool, self.groups.column_names

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.groups.row(index)
        ids = _ids_of(row)
        self.info.refuse_ids(ids, self.groups.name(index))
        return {name: row[name][0].as_py() for name in row.column_names if name != "ids"} | {
            "ids": ids[0].astype(np.int64)
        }

    def require_captions(self) -> None:
        """Raise UserError if there is no column `text`."""
        if "text" not in self.column_names:
            raise UserError(
                f"The ids in {self.folder} have no captions (columns {', '.join(self.column_names)}): encode them from "
                "a source with captions, with data.columns: [text]."
            )
