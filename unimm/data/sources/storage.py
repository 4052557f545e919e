"""Access to files by local path or by URL of any fsspec file system (hf://, s3://, https://).

`{000..009}` expands to every file name of the range, so a missing file is an error, while a pattern with `*` matches
only existing files. Byte ranges are read without fetching the rest of a file.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from tqdm.auto import tqdm

from unimm.errors import UserError, one_line

T = TypeVar("T")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_READERS = 16


def filled(source: str) -> str:
    """Return `source` with `$UNIMM_DATA` substituted (default ../shared)."""
    return source.replace("$UNIMM_DATA", os.environ.get("UNIMM_DATA", "../shared"))


def data_path(source: str) -> Path:
    """Return the local path `source` with `$UNIMM_DATA` substituted."""
    return Path(filled(source))


def is_url(source: str) -> bool:
    return "://" in source


def is_pattern(source: str) -> bool:
    """Return whether `source` is a pattern of many files: `{000..009}`, `*`, `?` or `[`."""
    return bool(_RANGE.search(source)) or (glob.has_magic(source) and not Path(source).exists())


def listed(pattern: str) -> list[str]:
    """List the files that a pattern names, in order; `{000..009}` lists every one, even if it does not exist.

    Raises:
        UserError: nothing matches.
    """
    expanded = _expanded(pattern)
    if not glob.has_magic(_RANGE.sub("", pattern)):
        return expanded
    found = sorted(place for each in expanded for place in _matching(each))
    if not found:
        raise UserError(f"No file matches {pattern}: look for a typing error, or set $UNIMM_DATA.")
    return found


def _expanded(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(last) < int(first):
        raise UserError(f"The range {match.group()} in {pattern} runs backwards.")
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [place for n in numbers for place in _expanded(pattern[: match.start()] + n + pattern[match.end() :])]


def _matching(pattern: str) -> list[str]:
    if not is_url(pattern):
        return glob.glob(pattern, recursive=True)
    with reaching(pattern):
        fs, path = opened_place(pattern)
        return [fs.unstrip_protocol(each) for each in fs.glob(path)]


def opened_place(place: str) -> tuple[Any, str]:
    """Return (file system, path in it) of a local path or URL."""
    return fsspec.core.url_to_fs(place)


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """Convert errors of file access inside the context into a one-sentence `UserError` that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"There is no file {place}: it is missing among the data that the run names; fetch it, or change the "
            "source."
        ) from None
    except ImportError as error:
        raise UserError(f"{place} needs a package that is not installed: {one_line(error)}.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place} cannot be read ({type(error).__name__}): {one_line(error)[:300]}") from error


def read_range(place: str, first: int, last: int) -> bytes:
    """Read the bytes `first` to `last`, exclusive, of a file."""
    with reaching(place):
        fs, path = opened_place(place)
        if fs.async_impl:  # a single range request; opening a file would read ahead
            return fs.cat_file(path, start=first, end=last)
        with fs.open(path, "rb", cache_type="none") as file:
            file.seek(first)
            return file.read(last - first)


def of_all(places: Sequence[str], look: Callable[[str], T], what: str) -> list[T]:
    """Call `look` on every place, in parallel threads, because storage latency dominates."""
    with ThreadPoolExecutor(_READERS) as pool:
        results = pool.map(look, places)
        return list(tqdm(results, total=len(places), desc=what, unit="file", disable=len(places) < 2 * _READERS))


def cache_folder(name: str) -> Path:
    """Return the cache folder `name`: in $UNIMM_CACHE, or else in Hugging Face's home folder."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("UNIMM_CACHE") or Path(HF_HOME) / "unimm") / name
