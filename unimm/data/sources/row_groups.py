"""Random access to the rows of local or remote parquet files, one row group at a time, with a small cache."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unimm.data.sources.storage import of_all, opened_place, reaching
from unimm.errors import UserError


class RowGroups:
    """Concatenated parquet files; a reader that follows `BlockOrder` reads every row group once per epoch.

    Args:
        places: paths or URLs.
        source: name of the whole source in error messages.
        pooled_rows: approximate number of rows that are shuffled together and kept in memory.
        columns: columns to read; None reads all.

    Attributes:
        blocks: number of rows of each row group.
        pool: number of row groups that are shuffled together.
        column_names: columns, the same in all files.
        file_rows, file_metadata: number of rows and metadata of each file.

    Raises:
        UserError: a file is missing or is not a parquet file, or there are no rows.
    """

    def __init__(
        self, places: Sequence[str], source: str, *, pooled_rows: int, columns: Sequence[str] | None = None
    ) -> None:
        footers = of_all(places, _footer, "parquet")
        self.groups = [
            (place, group)
            for place, (sizes, *_) in zip(places, footers, strict=True)
            for group, rows in enumerate(sizes)
            if rows
        ]
        self.file_rows = [sum(sizes) for sizes, *_ in footers]
        self.file_metadata = [metadata for *_, metadata in footers]
        self.blocks = np.array([rows for sizes, *_ in footers for rows in sizes if rows], dtype=np.int64)
        if not self.groups:
            raise UserError(f"{source} holds no rows.")
        self.column_names = footers[0][1]
        for place, (_, names, _) in zip(places, footers, strict=True):
            if names != self.column_names:
                others = ", ".join(self.column_names)
                raise UserError(f"{place} has the columns {', '.join(names)}, and {places[0]} has {others}.")
        self.columns = None if columns is None else list(columns)
        self.pool = max(1, round(pooled_rows / float(self.blocks.mean())))
        self.starts = np.concatenate([[0], np.cumsum(self.blocks)])
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, index: int) -> Any:
        """Return row `index` as a table of one row."""
        block = self._block(index)
        if block not in self._kept:
            while (
                len(self._kept) > self.pool
            ):  # one more than a pool: the replacement of a skipped row may be in the next block
                del self._kept[next(iter(self._kept))]
            self._kept[block] = self._read(*self.groups[block])
        return self._kept[block].slice(index - int(self.starts[block]), 1)

    def name(self, index: int) -> str:
        """Return the location of row `index` for error messages."""
        block = self._block(index)
        place, group = self.groups[block]
        return f"row {index - int(self.starts[block])} of row group {group} of {place}"

    def _block(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _read(self, place: str, group: int) -> Any:
        import pyarrow.parquet as pq

        with reaching(place):
            fs, path = opened_place(place)
            with fs.open(path, "rb") as file:
                return pq.ParquetFile(file).read_row_group(group, columns=self.columns).combine_chunks()


def _footer(place: str) -> tuple[list[int], list[str], dict[bytes, bytes]]:
    """Read the number of rows of each row group of a file, its columns and its metadata."""
    import pyarrow.parquet as pq  # comes with datasets, the train extra

    with reaching(place):
        fs, path = opened_place(place)
        with fs.open(path, "rb") as file:
            metadata = pq.read_metadata(file)
    groups = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    return groups, list(metadata.schema.to_arrow_schema().names), metadata.metadata or {}
