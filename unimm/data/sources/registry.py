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
from collections.abc import Sequence
from pathlib import Path

from unimm.data.shuffling import Rows
from unimm.data.sources.folders import FolderImages
from unimm.data.sources.rows import ReadOptions
from unimm.data.sources.storage import filled, is_pattern, is_url, listed
from unimm.data.sources.tables import ParquetShards, TableImages, parquet_images
from unimm.data.sources.tars import TarImages
from unimm.errors import UserError, reading

HUB = "hub:"
SHARDS = (".parquet", ".tar")


def open_images(source: str | Path, options: ReadOptions | None = None) -> Rows:
    """Open `source`; rows are `{"image": PIL RGB, "text": str, "key": str}` with the source's other fields.

    Raises:
        UserError: the source cannot be found or read, or is empty.
    """
    place, options = filled(str(source)), options or ReadOptions()
    if place.startswith(HUB):
        return hub_images(place.removeprefix(HUB), options)
    if is_pattern(place):
        return _shards(listed(place), place, options)
    if is_url(place):
        return _shards([place], place, options)
    path = Path(place)
    if not path.is_dir():
        return _shards([place], place, options)
    for suffix in SHARDS:
        if found := sorted(str(each) for each in path.rglob(f"*{suffix}")):
            return _shards(found, place, options)
    return FolderImages(path, options)


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
    return _shards([str(file) for file in files[options.split]], name, options)


def _shards(places: Sequence[str], source: str, options: ReadOptions) -> Rows:
    suffixes = {Path(place).suffix for place in places}
    if suffixes == {".tar"}:
        return TarImages(places, source, options)
    if suffixes == {".parquet"}:
        if options.streaming or any(map(is_url, places)):
            return ParquetShards(places, source, options)
        return parquet_images([Path(place) for place in places], options, source)
    if all(Path(place).exists() or is_url(place) for place in places):
        known = " or ".join(SHARDS)
        raise UserError(f"{source} names files that end in {', '.join(sorted(suffixes))}: shards end in {known}.")
    raise UserError(f"There is no {source}: no folder, no {' or '.join(SHARDS)} file; set $UNIMM_DATA to the data.")
