"""Images in tar shards, as written by webdataset and BLIP3o: `key.jpg`, `key.txt`, `key.json`, `key.cls` form a row.

A tar file has no index, so one is built: the headers are read once and the offsets of the members are cached. After
that any row is read with one range read, from disk or a URL, and the position in the data is a single number.

Names are split as in webdataset (https://github.com/webdataset/webdataset, `base_plus_ext`): a member's key ends at the
first dot of its file name, and consecutive members with the same key form a row. A kind with dots (`key.seg.png`) is
used as the plain kind (`key.png`) if there is none, as webdataset decodes by the last suffix. An ambiguous row (two
members of one kind) or an unreadable one (a link) is a bad row, counted and logged.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimm.data.bad_rows import BadRow
from unimm.data.shuffling import Rows
from unimm.data.sources.rows import ReadOptions
from unimm.data.sources.storage import cache_folder, is_url, of_all, opened_place, reaching, read_range
from unimm.errors import UserError, printable
from unimm.runs.provenance import write_atomically

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
READ = (*IMAGES, *CAPTIONS, "cls")
POOL = 8
"""Number of shards whose rows are shuffled together."""
_BLOCK = 512
_KEPT_INDICES = POOL + 1  # the replacement of a skipped row may be in the next shard
_INDEX_VERSION = 2


class TarImages(Rows):
    """The rows of local or remote tar shards: `{"image", "text", "key"}` and the fields of their .json.

    Raises:
        UserError: a shard is missing, truncated or not a tar file, or has no rows.
    """

    pool = POOL

    def __init__(self, places: Sequence[str], source: str, options: ReadOptions) -> None:
        self.places, self.options = list(places), options
        sizes = of_all(self.places, size_of, "tar")
        self.blocks = np.array([rows for rows, _ in sizes], dtype=np.int64)
        if not self.blocks.all():
            raise UserError(f"{self.places[int(self.blocks.argmin())]} holds no image ({', '.join(IMAGES)}).")
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
        if entry["bad"] is not None:
            raise BadRow(entry["bad"][0], f"{name}: {entry['bad'][1]}")
        chosen = _chosen(entry["members"], name)
        parts = _members(self.places[shard], chosen)
        raw_image = next((parts[kind] for kind in IMAGES if kind in parts), None)
        if raw_image is None:
            raise BadRow("no image", f"{name} has no image, only .{', .'.join(entry['members'])}")
        fields = _json(parts["json"], name) if "json" in parts else {}
        text = _text(parts["txt"], name) if "txt" in parts else fields.get(self.options.text_column)
        if "cls" in parts:
            fields |= {"cls": _label(parts["cls"], name)}
        image = self.options.image(raw_image, name)
        return {**fields, "key": printable(entry["key"]), "text": self.options.caption(text, name), "image": image}

    def _index(self, shard: int) -> list[dict[str, Any]]:
        if shard not in self._kept:
            while len(self._kept) >= _KEPT_INDICES:
                del self._kept[next(iter(self._kept))]
            self._kept[shard] = index_of(self.places[shard])
        return self._kept[shard]


def index_of(place: str) -> list[dict[str, Any]]:
    """Return the rows of a tar file in order: {"key", "members": {kind: [first byte, length]}, "bad": None or [reason,
    detail]}."""
    return json.loads(_index_file(place).read_text(encoding="utf-8").partition("\n")[2])


def size_of(place: str) -> tuple[int, bool]:
    """Return the number of rows of a tar file, and whether any row has a caption."""
    with _index_file(place).open(encoding="utf-8") as file:
        rows, captioned = json.loads(file.readline())
    return rows, captioned


def _index_file(place: str) -> Path:
    """Return the cached index file of a tar file, and build it if it is missing or the tar file changed. The first line
    holds the result of `size_of`, the second the rows."""
    with reaching(place):
        fs, path = opened_place(place)
        stamp = f"{_INDEX_VERSION} {place if is_url(place) else os.path.abspath(place)} {fs.ukey(path)}"
    cached = cache_folder("shards") / f"{hashlib.sha256(stamp.encode()).hexdigest()}.json"
    if cached.is_file():
        return cached
    with reaching(place), fs.open(path, "rb") as file:
        rows = _scan(place, file)
    size = len(rows), any(_last(kind) in CAPTIONS for row in rows for kind in row["members"])
    try:
        write_atomically(cached, f"{json.dumps(size)}\n{json.dumps(rows)}", "index of a tar file")
    except UserError as error:
        raise UserError(f"{error} Set $UNIMM_CACHE to a folder that can be written to.") from None
    return cached


def _scan(place: str, file: Any) -> list[dict[str, Any]]:
    """Read the headers of an open tar file; consecutive members with the same key form a row."""
    rows: list[dict[str, Any]] = []
    row: dict[str, Any] | None = None
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                key, kind = _key_of(member.name)
                if member.isdir() or not kind:
                    continue
                if row is None or row["key"] != key:
                    row = {"key": key, "members": {}, "bad": None}
                if _last(kind) not in READ:
                    continue
                if not row["members"]:
                    rows.append(row)
                _add(row, kind, member)
        file.seek(end)  # a complete tar ends with zero blocks; tarfile does not report a missing end
        whole = file.read(_BLOCK) == bytes(_BLOCK)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        whole, reason = False, str(error)
        if not end:
            raise UserError(f"{place} is no tar file ({reason}).") from None
    if not whole:
        raise UserError(
            f"{place} is cut off: it has no end mark behind its {len(rows)} rows; fetch it again, or leave it out of "
            "the source."
        )
    return rows


def _add(row: dict[str, Any], kind: str, member: tarfile.TarInfo) -> None:
    """Add a member to its row; a bad row keeps the first reason found."""
    if not member.isreg() or member.issparse():
        row["bad"] = row["bad"] or ["link in a tar", f"{member.name} is a link or sparse, no plain file"]
    elif kind in row["members"]:
        row["bad"] = row["bad"] or ["duplicate name", f"{member.name} is the second .{kind} of its key"]
    row["members"].setdefault(kind, [member.offset_data, member.size])


def _key_of(name: str) -> tuple[str, str]:
    """Split a member's name into (key, kind) at the first dot after the last slash; ("", "") for hidden files and names
    without a dot, which belong to no row."""
    name = printable(name)  # it may not be UTF-8
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return (folder + slash + stem, kind.lower()) if stem and kind else ("", "")


def _last(kind: str) -> str:
    return kind.rpartition(".")[2]


def _chosen(members: dict[str, Sequence[int]], name: str) -> dict[str, Sequence[int]]:
    """Select the members to read, by plain kind. Raises BadRow if the choice is ambiguous."""
    chosen = {kind: place for kind, place in members.items() if kind in READ}
    for kinds in (IMAGES, ("txt",), ("json",), ("cls",)):
        dotted = [kind for kind in members if _last(kind) in kinds]
        if any(kind in chosen for kind in kinds) or not dotted:
            continue
        if len(dotted) > 1:
            raise BadRow(
                "dots in a name",
                f"{name} holds .{' and .'.join(dotted[:3])}: a key ends at the first dot, so these are one row",
            )
        chosen[_last(dotted[0])] = members[dotted[0]]
    return chosen


def _members(place: str, members: dict[str, Sequence[int]]) -> dict[str, bytes]:
    """Read the bytes of a row's members with one range read that spans them all."""
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
    except (ValueError, RecursionError) as error:  # a number may be too long, brackets too deep
        raise BadRow("not JSON", f"the .json of {name}: {error}") from None
    if not isinstance(fields, dict):
        raise BadRow("not JSON", f"the .json of {name} holds a {type(fields).__name__}, no fields")
    return fields


def _label(data: bytes, name: str) -> int:
    try:
        return int(data)
    except ValueError:
        raise BadRow("wrong label", f"the .cls of {name} is {data[:20]!r}, no whole number") from None
