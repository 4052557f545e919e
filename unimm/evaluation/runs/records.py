"""What an evaluation run leaves behind, read without a model: one record per sample, and the manifest that says how.

A record is one JSON line. Its key is (item, sample): `item` names what is asked (a prompt, a question, an image),
`sample` counts the images or answers for it. Times and dates stand elsewhere, so that the same run gives the same
bytes twice.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimm.config.schema import build, plain
from unimm.errors import UserError, one_line
from unimm.runs.provenance import git_commit, hardware, package_versions

Key = tuple[str, int]

MANIFEST, RECORDS, SUMMARY = "manifest.json", "records.jsonl", "summary.json"
UNREADABLE = "unreadable"
"""What the reason of a record begins with whose image could not be read or measured; the run goes on without it."""


@dataclass(frozen=True)
class Record:
    """What came out for one sample.

    Args:
        bench, item, sample: whose it is; see the module.
        seed: what it was drawn or answered with.
        inputs: what was asked. Reports read `prompt` or `question`, `tag`, `part` (of a benchmark that measures
            several things), `cluster` (what makes samples alike; default: the item) and `original_path` (an image).
        output_path: the image, relative to the run's folder where it lies inside.
        raw_scores: everything measured or detected, before any rule; `detections` have `label`, `box` (xyxy) and
            `score`, and where they are known `outline` (polygons of the mask), `color` and `color_votes` (shares).
        verdict: what the rule says, None where there is none to say.
        reason: why not, one line per failed rule.
        judge: `name`, `version`, `sha256` of the model that judged; empty for a rule that needs none.
    """

    bench: str
    item: str
    sample: int = 0
    seed: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)
    output_path: str | None = None
    raw_scores: dict[str, Any] = field(default_factory=dict)
    verdict: bool | float | None = None
    reason: str = ""
    judge: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.item, self.sample

    @property
    def is_unreadable(self) -> bool:
        """Return whether the sample's image could not be read or measured."""
        return self.reason.startswith(f"{UNREADABLE}: ")


@dataclass(frozen=True)
class Manifest:
    """How a run came about. All but `arguments` decides its results.

    Args:
        prompts_sha256: `content_sha256` of everything that is asked.
        settings: guidance, temperature, image size, protocol, dtype, thresholds.
        weights: the fingerprint of each model that takes part, by its role (`model`, `detector`, ...).
        hardware: models of the processor and the GPUs: verdicts of one network differ between them. Empty in manifests
            of earlier versions.
        arguments: of the command, from which `--from` starts the run again.
    """

    bench: str
    prompts_sha256: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=package_versions)
    hardware: dict[str, str] = field(default_factory=hardware)
    commit: str | None = field(default_factory=git_commit)
    arguments: dict[str, Any] = field(default_factory=dict)

    def differences(self, other: "Manifest") -> list[str]:
        """The dotted keys that decide results and differ, each with both values."""
        mine, theirs = (dict(leaves(plain(manifest))) for manifest in (self, other))
        keys = [key for key in dict.fromkeys([*mine, *theirs]) if not key.startswith("arguments.")]
        return [
            f"{key} ({json.dumps(mine.get(key))}, now {json.dumps(theirs.get(key))})"
            for key in keys
            if (key in mine, mine.get(key)) != (key in theirs, theirs.get(key))
        ]


def unreadable(error: BaseException) -> str:
    """Return the reason of a record whose image could not be read."""
    return f"{UNREADABLE}: {one_line(error)}"


def unreadable_names(records: Iterable[Record]) -> list[str]:
    """Return the items of such records, for a summary: they are named, and so counted."""
    return [record.item for record in records if record.is_unreadable]


def content_sha256(rows: Iterable[Any]) -> str:
    """sha256 over rows of plain values, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def to_line(record: Record) -> str:
    """One line of JSON, ASCII only and with its keys sorted: equal records are equal bytes.

    Raises:
        ValueError: a score that is not finite, which JSON does not know. TypeError: one that is no plain value.
    """
    if infinite := [(name, value) for name, value in leaves(record.raw_scores) if not _is_finite(value)]:
        name, value = infinite[0]
        raise ValueError(f"{record.bench} {record.key}: {name} is {value}, and a record holds finite numbers only")
    return json.dumps(vars(record), sort_keys=True, allow_nan=False) + "\n"


def parse_lines(path: Path) -> Iterator[Record]:
    """The records of one file. Raises UserError for a line that is none, with its number."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            tree = json.loads(line)
        except ValueError as error:
            raise UserError(f"Line {number} of {path} is no record ({error}): the file is damaged.") from None
        if not isinstance(tree, dict):
            raise UserError(f"Line {number} of {path} is no record: it is {line[:40]!r}.")
        yield build(Record, tree, key="", source=f"line {number} of {path}")


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in a file, or of a run's folder. Raises UserError where there is none or another thing."""
    path = Path(path)
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"There is no {path}: name the folder of an evaluation run, or its {MANIFEST}.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no manifest: it is a {type(tree).__name__}, expected an object.")
    # what an older manifest does not say is unknown, and not what this machine would say
    tree = {"versions": {}, "hardware": {}, "commit": None} | tree
    return build(Manifest, tree, key="", source=str(path))


def read_records(folder: str | Path) -> list[Record]:
    """The records of a finished run, in the order of their keys. Raises UserError where the run is not finished."""
    path = Path(folder) / RECORDS
    if not path.is_file():
        raise UserError(f"There is no {path}: the folder holds no run, or one that is not finished yet.")
    return list(parse_lines(path))


def read_summary(folder: str | Path) -> dict[str, Any]:
    """The summary of a finished run. Raises UserError where the run is not finished."""
    path = Path(folder) / SUMMARY
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): is there a run, and is it finished?") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no summary: it is a {type(tree).__name__}, expected an object.")
    return tree


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree
