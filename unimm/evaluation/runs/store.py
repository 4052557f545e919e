"""A resumable store for evaluation runs: safe to kill at any time, with byte-identical results after a resume.

    folder/manifest.json            describes the run; a run with a different manifest is rejected
    folder/images/                  images
    folder/parts/rank-0.jsonl       records in order of arrival, one file per process; deleted when the run is finished
    folder/timings.jsonl            seconds per record, the only file that differs from run to run
    folder/records.jsonl            all records in the order of their keys; written last, together with
    folder/summary.json             a pure function of the records

Processes (`accelerate launch`, `torchrun`) share only the folder and barriers. Each of n processes takes every n-th
block of the missing keys, and the main process merges all records by key.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from accelerate import PartialState
from filelock import FileLock

from unimm.config.schema import plain
from unimm.errors import UserError
from unimm.evaluation.runs.records import (
    MANIFEST,
    RECORDS,
    SUMMARY,
    Key,
    Manifest,
    Record,
    content_sha256,
    parse_lines,
    read_manifest,
    to_line,
)
from unimm.runs.processes import lock_folder, processes, refuse_together
from unimm.runs.provenance import write_atomically

__all__ = ["Key", "Manifest", "Record", "RunStore", "content_sha256", "processes", "sample_seed"]

IMAGES, PARTS, TIMINGS = "images", "parts", "timings.jsonl"
NAMED_KEYS = 10  # keys listed in an error message before it is shortened

Summarize = Callable[[list[Record]], Mapping[str, Any]]


def sample_seed(run_seed: int, bench: str, item: str, sample: int) -> int:
    """Return the seed of one sample, from 0 to 2**63 - 1, independent of batch, order and number of processes."""
    text = json.dumps([run_seed, bench, item, sample])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class RunStore:
    """The open folder of a run, a context manager. Create it with `RunStore.open`, on every process."""

    def __init__(self, folder: Path, manifest: Manifest, state: PartialState, lock: FileLock | None) -> None:
        self.folder, self.manifest = folder, manifest
        self._state, self._lock = state, lock
        self._files: dict[str, IO[str]] = {}
        self._expected: list[Key] | None = None
        self.done: set[Key] = {record.key for record in self.records()}

    @classmethod
    def open(cls, folder: str | Path, manifest: Manifest) -> Self:
        """Create the folder, or resume the run in it.

        Raises:
            UserError: the folder holds other files, a run with a different manifest, or one that is being written.
        """
        folder, state, locks = Path(folder), processes(), list[FileLock]()
        refuse_together(lambda: locks.append(_prepare(folder, manifest)))
        lock = locks[0] if locks else None
        store = cls(folder, manifest, state, lock)
        state.wait_for_everyone()  # no process may append while another still reads the records
        return store

    def split(self, keys: Iterable[Key], *, together: int = 1) -> list[Key]:
        """Return the missing keys among `keys` that are assigned to this process.

        `together` is the block size of `split_blocks`. `finish` requires a record for every key of every call.
        """
        return [key for block in self.split_blocks(keys, together) for key in block if key not in self.done]

    def split_blocks(self, keys: Iterable[Key], size: int) -> list[list[Key]]:
        """Split `keys` into blocks of `size` consecutive keys, and return the incomplete blocks of this process.

        A block with a missing key is returned whole: the last bit of a matrix product depends on the rest of its batch,
        so batches must be the same for any number of processes and after any interruption. Append only missing keys.
        """
        keys = list(keys)
        self._expected = [*(self._expected or []), *keys]
        if doubled := sorted(key for key, count in Counter(self._expected).items() if count > 1):
            raise ValueError(f"a key stands for one sample, but these come twice: {_listed(doubled)}")
        blocks = [keys[start : start + size] for start in range(0, len(keys), size)]
        todo = [block for block in blocks if not self.done.issuperset(block)]
        return todo[self._state.process_index :: self._state.num_processes]

    def append(self, record: Record, *, seconds: float | None = None) -> None:
        """Write one record to disk immediately, with the `seconds` that it took.

        Raises:
            ValueError: it belongs to another benchmark, its key is already recorded, or a score is not finite.
        """
        if record.bench != self.manifest.bench or record.key in self.done:
            raise ValueError(f"{record.bench} {record.key} is not missing in this run of {self.manifest.bench}")
        if record.output_path is not None:
            record = dataclasses.replace(record, output_path=self.inside(record.output_path))
        self._write(f"{PARTS}/rank-{self._state.process_index}.jsonl", to_line(record))
        self.done.add(record.key)
        if seconds is not None:
            timing = {"item": record.item, "sample": record.sample, "seconds": round(seconds, 4)}
            self._write(TIMINGS, json.dumps(timing) + "\n")

    def records(self) -> list[Record]:
        """Return the records of all processes so far, in the order of the keys.

        Raises:
            UserError: a line is damaged, or there are two different records of one key.
        """
        found: dict[Key, Record] = {}
        for path in _record_files(self.folder):
            for record in parse_lines(path):
                if found.setdefault(record.key, record) != record:
                    raise UserError(f"{self.folder} holds two different records of {record.key}: start anew.")
        return [found[key] for key in sorted(found)]

    def image_path(self, item: str, sample: int = 0, *, role: str = "") -> Path:
        """Return the path for a sample's image, or for another image (`role`) of it.

        The file name is valid on any system and unique per item.
        """
        readable = re.sub(r"[^a-z0-9]+", "-", item.lower()).strip("-")[:60] or "item"
        digest = hashlib.blake2b(item.encode(), digest_size=4).hexdigest()
        return self.folder / IMAGES / f"{readable}-{digest}-{sample}{f'-{role}' if role else ''}.png"

    def inside(self, path: str | Path) -> str:
        """Return the path as records store it: relative to the folder if it is inside."""
        within = Path(path).is_relative_to(self.folder)
        return Path(path).relative_to(self.folder).as_posix() if within else str(path)

    def finish(self, summarize: Summarize) -> dict[str, Any]:
        """Merge the records of all processes, write records.jsonl and summary.json, close, and return the summary.

        Args:
            summarize: a pure function of all records, called on the main process.

        Raises:
            UserError: keys passed to `split` have no record, or records have no such key.
        """
        self._close_files()
        self._state.wait_for_everyone()
        try:
            refuse_together(lambda: self._merge(summarize))
        finally:
            self.close()
        summary: dict[str, Any] = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        return summary

    def close(self) -> None:
        """Release the folder to other processes; recorded samples are kept."""
        self._close_files()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _merge(self, summarize: Summarize) -> None:
        """Write records.jsonl and summary.json, then delete the parts."""
        records = self.records()
        recorded = {record.key for record in records}
        expected = recorded if self._expected is None else set(self._expected)
        if missing := sorted(expected - recorded):
            raise UserError(
                f"{len(missing)} of {len(expected)} samples of {self.folder} have no record: {_listed(missing)}."
            )
        if foreign := sorted(recorded - expected):
            raise UserError(f"{self.folder} holds {len(foreign)} records that nobody asked for: {_listed(foreign)}.")
        summary = json.dumps(plain(summarize(records)), indent=2, sort_keys=True, allow_nan=False) + "\n"
        write_atomically(self.folder / RECORDS, "".join(to_line(record) for record in records))
        write_atomically(self.folder / SUMMARY, summary)
        for path in (self.folder / PARTS).glob("*.jsonl"):
            path.unlink()

    def _write(self, name: str, line: str) -> None:
        if name not in self._files:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            self._files[name] = path.open("a", encoding="ascii")
        file = self._files[name]
        file.write(line)
        file.flush()
        os.fsync(file.fileno())  # a record counts as done only once it is on disk

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _prepare(folder: Path, manifest: Manifest) -> FileLock:
    """Lock the folder, check or write its manifest, and remove partially written files and lines."""
    if folder.is_dir() and not (folder / MANIFEST).exists() and any(folder.glob("[!.]*")):
        raise UserError(f"--output {folder} holds other files and no run: choose a new folder, or one with a run.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    except OSError as error:
        raise UserError(f"Cannot write into {folder}: {error.strerror or error}.") from None
    path = folder / MANIFEST
    try:
        for leftover in [*folder.glob(".*.tmp"), *(folder / IMAGES).glob(".*.tmp*")]:
            leftover.unlink()  # from a process that was killed while writing
        if not path.exists():
            write_atomically(path, json.dumps(plain(manifest), indent=2) + "\n")
        elif differing := read_manifest(path).differences(manifest):
            raise UserError(
                f"{folder} holds a run that differs in {', '.join(differing)}: repeat it as it was, or start in a "
                "new folder."
            )
        for part in _record_files(folder) + sorted(folder.glob(TIMINGS)):
            _drop_torn_line(part)
    except BaseException:
        lock.release()
        raise
    return lock


def _record_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(RECORDS)) + sorted((folder / PARTS).glob("*.jsonl"))


def _drop_torn_line(path: Path) -> None:
    """Truncate the file after its last line feed: a killed process may have left a partial line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _listed(keys: Sequence[Key]) -> str:
    named = ", ".join(f"{item} #{sample}" for item, sample in keys[:NAMED_KEYS])
    return named + (f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else "")
