"""Images in tar files, as webdataset and BLIP3o write them: `key.jpg`, `key.txt`, `key.json`, `key.cls` make a row.

A tar file has no table of contents, so one is made: the headers are read once and the places of the members kept in a
cache. From then on every row can be read at once, by one range read, from a disk or a URL, and the position in the data
is a number.

Names are cut as webdataset cuts them (https://github.com/webdataset/webdataset, `base_plus_ext`): a member's key ends
at the first dot of its file name, and members that follow each other under one key are a row. A kind with dots in it
(`key.seg.png`) stands in for a plain one (`key.png`) where there is none, as webdataset decodes it by its last part.
What makes a row ambiguous (two members of one kind) or unreadable (a link) makes it a bad row, counted and named.
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
"""Shards whose rows are shuffled together."""
_BLOCK = 512
_KEPT_INDICES = POOL + 1  # what stands in for a skipped row may lie behind the pool
_INDEX_VERSION = 2


class TarImages(Rows):
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
    """Return the rows of a tar file in order: {"key", "members": {kind: [first byte, length]}, "bad": None, or [reason,
    detail] of a row that cannot be used}."""
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
    size = len(rows), any(_last(kind) in CAPTIONS for row in rows for kind in row["members"])
    try:
        write_atomically(cached, f"{json.dumps(size)}\n{json.dumps(rows)}", "index of a tar file")
    except UserError as error:
        raise UserError(f"{error} Set $UNIMM_CACHE to a folder that can be written to.") from None
    return cached


def _scan(place: str, file: Any) -> list[dict[str, Any]]:
    """Read the headers of an open tar file; members that follow each other under one key are a row."""
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
        file.seek(end)
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
    """Put a member into its row; the first thing that is wrong with a row is what it is refused for."""
    if not member.isreg() or member.issparse():
        row["bad"] = row["bad"] or ["link in a tar", f"{member.name} is a link or sparse, no plain file"]
    elif kind in row["members"]:
        row["bad"] = row["bad"] or ["duplicate name", f"{member.name} is the second .{kind} of its key"]
    row["members"].setdefault(kind, [member.offset_data, member.size])


def _key_of(name: str) -> tuple[str, str]:
    """(key, kind) of a member: its name is cut at the first dot behind the last slash; ("", "") of a hidden file, and
    without a dot, which are of no row."""
    name = printable(name)  # it may be no UTF-8
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return (folder + slash + stem, kind.lower()) if stem and kind else ("", "")


def _last(kind: str) -> str:
    return kind.rpartition(".")[2]


def _chosen(members: dict[str, Sequence[int]], name: str) -> dict[str, Sequence[int]]:
    """The members that are read, under their plain kinds. Raises BadRow if several could be meant."""
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
