"""Opening of image data sets: `open_images` picks the reader from the form of the source string.

| source | is read as |
|---|---|
| `hub:owner/name` | a data set of the Hugging Face Hub (or a local copy of one) |
| `FILE.parquet`, `FILE.tar`, a folder of such files | one or many shards |
| `DIR/{000..009}.tar`, `DIR/*.parquet` | the shards that match the pattern |
| a URL of any of these (`hf://`, `s3://`, `https://`, ...) | the same, read in place |
| any other folder | its images, with captions in files next to them |
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unimm.data.shuffling import Rows
from unimm.data.sources.folders import FolderImages
from unimm.data.sources.rows import ReadOptions
from unimm.data.sources.storage import filled, is_pattern, is_url, listed
from unimm.data.sources.tables import ParquetShards, TableImages, parquet_images
from unimm.data.sources.tars import TarImages
from unimm.errors import UserError, reading

HUB = "hub:"


@dataclass(frozen=True)
class SourceKind:
    """A kind of source.

    Args:
        what: its name in messages.
        open: (files, source as given, options) -> rows.
        options: the `ReadOptions` that it has; others are refused.
    """

    what: str
    open: Callable[[Sequence[str], str, ReadOptions], Rows]
    options: tuple[str, ...]


def _parquet(files: Sequence[str], source: str, options: ReadOptions) -> Rows:
    if options.streaming or any(map(is_url, files)):
        return ParquetShards(files, source, options)
    return parquet_images([Path(file) for file in files], options, source)


ROW = ("text_column", "target_column", "max_aspect_ratio", "min_side")
SHARDS = {
    ".parquet": SourceKind("a table of parquet files", _parquet, ("streaming", "image_column", *ROW)),
    ".tar": SourceKind("a set of tar shards", TarImages, ("streaming", "text_column", "max_aspect_ratio", "min_side")),
}
"""Kinds of files with many images each, by suffix."""

FOLDER = SourceKind("a folder of images", lambda files, source, options: FolderImages(Path(source), options), ROW)


def open_images(source: str | Path, options: ReadOptions | None = None, *, strict: bool = True) -> Rows:
    """Open `source`; rows are `{"image": PIL RGB, "text": str, "key": str}` with the source's other fields.

    Args:
        strict: refuse options that this kind of source does not have; False if they are another source's, too.

    Raises:
        UserError: the source cannot be found or read, is empty, or does not have an option that is set.
    """
    place, options = filled(str(source)), options or ReadOptions()
    if place.startswith(HUB):
        return hub_images(place.removeprefix(HUB), options)
    if is_pattern(place):
        return _shards(listed(place), place, options, strict)
    if is_url(place):
        return _shards([place], place, options, strict)
    path = Path(place)
    if not path.is_dir():
        return _shards([place], place, options, strict)
    for suffix in SHARDS:
        if found := sorted(str(each) for each in path.rglob(f"*{suffix}")):
            return _shards(found, place, options, strict)
    return _opened(FOLDER, [], place, options, strict)


def hub_images(name: str, options: ReadOptions) -> Rows:
    """Open a data set of the Hub: copied to the cache, or with `streaming` its parquet or tar files read in place."""
    from datasets import load_dataset, load_dataset_builder

    with reading("The hub data set", name):
        if not options.streaming:
            table = load_dataset(name, options.subset, split=options.split, cache_dir=os.environ.get("UNIMM_CACHE"))
            return TableImages(table, name, options)
        files = load_dataset_builder(name, options.subset).config.data_files or {}
    if options.split not in files:
        raise UserError(
            f"{name} has no files for the split {options.split!r}; it has {', '.join(map(str, files)) or 'none'}."
        )
    return _shards([str(file) for file in files[options.split]], name, options, strict=False)


def _opened(kind: SourceKind, files: Sequence[str], source: str, options: ReadOptions, strict: bool) -> Rows:
    if strict:
        options.refuse_others(source, kind.what, kind.options)
    return kind.open(files, source, options)


def _shards(files: Sequence[str], source: str, options: ReadOptions, strict: bool) -> Rows:
    suffixes = {Path(file).suffix for file in files}
    for suffix, kind in SHARDS.items():
        if suffixes == {suffix}:
            return _opened(kind, files, source, options, strict)
    if all(Path(file).exists() or is_url(file) for file in files):
        known = " or ".join(SHARDS)
        raise UserError(f"{source} names files that end in {', '.join(sorted(suffixes))}: shards end in {known}.")
    raise UserError(f"There is no {source}: no folder, no {' or '.join(SHARDS)} file; set $UNIMM_DATA to the data.")
