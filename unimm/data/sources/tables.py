"""Images in parquet tables: through `datasets` (memory-mapped, fast random access), or read in place by row group if
the files are too large to copy or are remote."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimm.data.shuffling import Rows
from unimm.data.sources.row_groups import RowGroups
from unimm.data.sources.rows import ReadOptions
from unimm.errors import UserError

POOLED_ROWS = 2048
"""Number of rows of a table read in place that are shuffled together and kept in memory."""


class TableImages(Rows):
    """The rows of a `datasets.Dataset` as `{"image": PIL RGB, "text": str, "key": str}` with the other columns.

    Raises:
        UserError: there is no image column, or there are no rows.
    """

    def __init__(self, table: Any, source: str, options: ReadOptions | None = None) -> None:
        from datasets import Image

        self.source, self.options = source, options or ReadOptions()
        column = self.options.image_column
        _require_columns(table.column_names, self.options, source)
        if isinstance(table.features[column], Image):  # decoded here, so that a damaged image is a bad row
            table = table.cast_column(column, Image(decode=False))
        self.table, self.column_names = table, table.column_names
        self.caption_gap = _caption_gap(table.column_names, self.options)
        if not len(table):
            raise UserError(f"{source} holds no rows.")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _row(self.table[index], f"row {index} of {self.source}", str(index), self.options)


def parquet_images(paths: Sequence[Path], options: ReadOptions | None = None, source: str = "") -> TableImages:
    """Open local parquet files, concatenated."""
    from datasets import Dataset  # the train extra: heavy, and not needed for the shapes data set
    from datasets.exceptions import DatasetGenerationError

    for path in paths:
        if not path.is_file():
            raise UserError(f"There is no parquet file {path}; set $UNIMM_DATA to the folder that holds the data.")
    source = source or str(paths[0])
    try:
        table = Dataset.from_parquet([str(path) for path in paths], cache_dir=os.environ.get("UNIMM_CACHE"))
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise UserError(f"{source} is not a readable parquet file: {error}.") from error
    return TableImages(table, source, options)


class ParquetShards(Rows):
    """The same rows as `TableImages`, from local or remote parquet files that are read in place (`RowGroups`)."""

    def __init__(self, places: Sequence[str], source: str, options: ReadOptions) -> None:
        self.options = options
        self.groups = RowGroups(places, source, pooled_rows=POOLED_ROWS)
        self.blocks, self.pool = self.groups.blocks, self.groups.pool
        self.column_names = self.groups.column_names
        _require_columns(self.column_names, options, source)
        self.caption_gap = _caption_gap(self.column_names, options)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = self.groups.row(index).to_pylist()
        return _row(row, self.groups.name(index), str(index), self.options)


def _require_columns(columns: Sequence[str], options: ReadOptions, source: str) -> None:
    if options.image_column not in columns:
        raise UserError(f"{source} has no column {options.image_column!r}; its columns are {', '.join(columns)}.")


def _caption_gap(columns: Sequence[str], options: ReadOptions) -> str | None:
    if options.text_column in columns:
        return None
    return f"it has no column {options.text_column!r}; its columns are {', '.join(columns)}"


def _row(row: Mapping[str, Any], name: str, key: str, options: ReadOptions) -> dict[str, Any]:
    image = options.image(row[options.image_column], name)
    return {**row, "key": key, "text": options.caption(row.get(options.text_column), name), "image": image}
