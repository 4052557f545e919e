"""Pictures in tar files, as webdataset and BLIP3o write them: `key.jpg`, `key.txt`, `key.json`, `key.cls` make a row.

Special here: a tar file has no table of contents, so one is made: the headers are read once and the places of the
members kept in a cache. From then on every row can be read at once, by one range read, from a disk or a URL, and the
position in the data is a number.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimm.data.order import Rows
from unimm.data.places import cache_folder, is_url, of_all, opened_place, reaching, read_range
from unimm.data.reading import ReadOptions
from unimm.data.skipping import BadRow
from unimm.errors import UserError, printable
from unimm.provenance import write_atomically

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
READ = (*PICTURES, *CAPTIONS, "cls")
POOL = 8
"""Shards whose rows are shuffled together."""
_BLOCK = 512
_KEPT_INDICES = POOL + 1  # what stands in for a skipped row may lie behind the pool
_INDEX_VERSION = 1


class TarPictures(Rows):
    """The rows of tar files at any place, `{"image", "text", "key"}` and the fields of their .json.

    Raises:
        UserError: a shard is missing, cut off or no tar file, or holds no rows.
    """

    pool = POOL

    def __init__(self, places: Sequence[str], source: str, options: ReadOptions) -> None:
        self.places, self.options = list(places), options
        sizes = of_all(self.places, size_of, "tar")
        self.blocks = np.array([rows for rows, _ in sizes], dtype=np.int64)
        if not self.blocks.all():
            raise UserError(f"{self.places[int(self.blocks.argmin())]} holds no picture ({', '.join(PICTURES)}).")
        if not any(captioned for _, captioned in sizes):
            self.caption_gap = f"no row of it has one of .{', .'.join(CAPTIONS)}"
        self.starts = np.concatenate([[0], np.cumsum(self.blocks)])
        self._kept: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        entry = self._index(shard)[index - int(self.starts[shard])]
        name = f"{entry['key']} in {self.places[shard]}"
        parts = _members(self.places[shard], entry["members"])
        picture = next((parts[kind] for kind in PICTURES if kind in parts), None)
        if picture is None:
            raise BadRow("no picture", f"{name} has no picture, only .{', .'.join(parts)}")
        fields = _json(parts["json"], name) if "json" in parts else {}
        text = _text(parts["txt"], name) if "txt" in parts else fields.get(self.options.text_column)
        if "cls" in parts:
            fields |= {"cls": _label(parts["cls"], name)}
        image = self.options.picture(picture, name)
        return {**fields, "key": printable(entry["key"]), "text": self.options.caption(text, name), "image": image}

    def _index(self, shard: int) -> list[dict[str, Any]]:
        if shard not in self._kept:
            while len(self._kept) >= _KEPT_INDICES:
                del self._kept[next(iter(self._kept))]
            self._kept[shard] = index_of(self.places[shard])
        return self._kept[shard]


def index_of(place: str) -> list[dict[str, Any]]:
    """The rows of a tar file in order: {"key", "members": {kind: [first byte, length]}}."""
    return json.loads(_index_file(place).read_text(encoding="utf-8").partition("\n")[2])


def size_of(place: str) -> tuple[int, bool]:
    """Rows of a tar file, and whether any has a caption."""
    with _index_file(place).open(encoding="utf-8") as file:
        rows, captioned = json.loads(file.readline())
    return rows, captioned


def _index_file(place: str) -> Path:
    """The cached index of a tar file, made where there is none or the file changed: its size in the first line, its
    rows in the second."""
    with reaching(place):
        fs, path = opened_place(place)
        stamp = f"{_INDEX_VERSION} {place if is_url(place) else os.path.abspath(place)} {fs.ukey(path)}"
    cached = cache_folder("shards") / f"{hashlib.sha256(stamp.encode()).hexdigest()}.json"
    if cached.is_file():
        return cached
    with reaching(place), fs.open(path, "rb") as file:
        rows = _scan(place, file)
    size = len(rows), any(kind in row["members"] for row in rows for kind in CAPTIONS)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, f"{json.dumps(size)}\n{json.dumps(rows)}")
    except OSError as error:
        raise UserError(
            f"The index of a tar file cannot be kept in {cached.parent}: {error.strerror}; set $UNIMM_CACHE to a "
            "folder that can be written to."
        ) from None
    return cached


def _scan(place: str, file: Any) -> list[dict[str, Any]]:
    """Read the headers of an open tar file; members that follow each other under one key are a row."""
    rows: list[dict[str, Any]] = []
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                key, kind = _key_of(member.name)
                if not member.isfile() or kind not in READ:
                    continue
                if not rows or rows[-1]["key"] != key:
                    rows.append({"key": key, "members": {}})
                rows[-1]["members"][kind] = [member.offset_data, member.size]
        file.seek(end)
        whole = file.read(_BLOCK) == bytes(_BLOCK)
    except (tarfile.TarError, EOFError) as error:
        whole, reason = False, str(error)
        if not end:
            raise UserError(f"{place} is no tar file ({reason}).") from None
    if not whole:
        raise UserError(
            f"{place} is cut off: it has no end mark behind its {len(rows)} rows; fetch it again, or leave it out of "
            "the source."
        )
    return rows


def _key_of(name: str) -> tuple[str, str]:
    """(key, kind) of a member: its name is cut at the first dot behind the last slash, as webdataset cuts it."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, kind.lower()


def _members(place: str, members: dict[str, Sequence[int]]) -> dict[str, bytes]:
    """The bytes of a row's members, by one range read over them all."""
    first = min(start for start, _ in members.values())
    last = max(start + length for start, length in members.values())
    data = read_range(place, first, last)
    return {kind: data[start - first : start - first + length] for kind, (start, length) in members.items()}


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRow("wrong caption", f"the .txt of {name} is not UTF-8: {error.reason}") from None


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadRow("not JSON", f"the .json of {name}: {error}") from None
    if not isinstance(fields, dict):
        raise BadRow("not JSON", f"the .json of {name} holds a {type(fields).__name__}, no fields")
    return fields


def _label(data: bytes, name: str) -> int:
    try:
        return int(data)
    except ValueError:
        raise BadRow("wrong label", f"the .cls of {name} is {data[:20]!r}, no whole number") from None
