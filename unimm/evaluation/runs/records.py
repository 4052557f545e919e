"""Records and manifest of an evaluation run: one record per sample, and a manifest that describes the run.

A record is one JSON line. Its key is (item, sample): `item` names the input (a prompt, a question, an image), and
`sample` numbers the images or answers generated for it. Times and dates are stored elsewhere, so that the same run
writes the same bytes twice. Needs no model.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from unimm.config.schema import build, plain
from unimm.errors import UserError, one_line
from unimm.runs.provenance import git_commit, hardware, package_versions

Key = tuple[str, int]

FORMER_ARGUMENTS = {
    "judge": "vqa_model",
    "judge_kind": "vqa_kind",
    "judge_batch_size": "vqa_batch_size",
    "allow_self_judge": "allow_self_scoring",
    "vqa": "vqa_model",
    "canary": "sanity_images",
    "no_canary": "no_sanity_check",
}
"""Former name -> name of a command's argument; manifests and command lines may have either."""
_FORMER_KEYS = {
    "judge": "scorer",
    "judge_batch_size": "vqa_batch_size",
    "canary": "sanity_images",
    "entropy_of_picture": "entropy_of_image",
}
"""Former key -> key of a manifest's settings and weights, and of a record's raw scores."""

MANIFEST, RECORDS, SUMMARY = "manifest.json", "records.jsonl", "summary.json"
UNREADABLE = "unreadable"
"""Prefix of the reason of a record whose image could not be read or scored; the run continues without it."""


@dataclass(frozen=True)
class Record:
    """The result of one sample.

    Args:
        bench, item, sample: benchmark and key of the sample; see the module docstring.
        seed: seed with which the image or answer was generated.
        inputs: the inputs of the sample. Reports use `prompt` or `question`, `tag`, `part` (of a benchmark with
            several parts), `cluster` (groups dependent samples; default: the item) and `original_path` (an image).
        output_path: path of the image, relative to the run's folder if it is inside.
        raw_scores: everything measured or detected, before any rule; `detections` have `label`, `box` (xyxy) and
            `score`, and if known `outline` (polygons of the mask), `color` and `color_votes` (shares).
        verdict: result of the scoring rule, None without one.
        reason: why the sample failed, one line per failed rule.
        scorer: `name`, `version`, `sha256` of the scorer; empty for a rule that needs no model.
    """

    FORMER: ClassVar[dict[str, str]] = {"judge": "scorer"}

    bench: str
    item: str
    sample: int = 0
    seed: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)
    output_path: str | None = None
    raw_scores: dict[str, Any] = field(default_factory=dict)
    verdict: bool | float | None = None
    reason: str = ""
    scorer: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.item, self.sample

    @property
    def is_unreadable(self) -> bool:
        """Return whether the sample's image could not be read or scored."""
        return self.reason.startswith(f"{UNREADABLE}: ")


@dataclass(frozen=True)
class Manifest:
    """The description of a run. Everything but `arguments` determines its results.

    Args:
        prompts_sha256: `content_sha256` of all inputs.
        settings: guidance, temperature, image size, protocol, dtype, thresholds.
        weights: the fingerprint of each model involved, by its role (`model`, `detector`, ...).
        hardware: models of the CPU and the GPUs, because verdicts of one network differ between them. Empty in
            manifests of earlier versions.
        arguments: arguments of the command, with which `--from` repeats the run.
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
        """Return the dotted keys that determine results and differ, each with both values."""
        mine, theirs = (dict(leaves(plain(manifest))) for manifest in (self, other))
        keys = [key for key in dict.fromkeys([*mine, *theirs]) if not key.startswith("arguments.")]
        return [
            f"{key} ({json.dumps(mine.get(key))}, now {json.dumps(theirs.get(key))})"
            for key in keys
            if (key in mine, mine.get(key)) != (key in theirs, theirs.get(key))
        ]


def _present(tree: dict[str, Any], section: str, former: Mapping[str, str]) -> dict[str, Any]:
    """Return the tree of a file with the present names of the section's former keys."""
    if not isinstance(here := tree.get(section), dict):
        return tree
    return tree | {section: {former.get(name, name): value for name, value in here.items()}}


def unreadable(error: BaseException) -> str:
    """Return the reason of a record whose image could not be read."""
    return f"{UNREADABLE}: {one_line(error)}"


def unreadable_names(records: Iterable[Record]) -> list[str]:
    """Return the items of unreadable records, for a summary."""
    return [record.item for record in records if record.is_unreadable]


def content_sha256(rows: Iterable[Any]) -> str:
    """Compute the sha256 of rows of plain values, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def to_line(record: Record) -> str:
    """Return the record as one line of JSON, ASCII only and with sorted keys: equal records are equal bytes.

    Raises:
        ValueError: a score is not finite, which JSON cannot represent.
        TypeError: a score is not a plain value.
    """
    if infinite := [(name, value) for name, value in leaves(record.raw_scores) if not _is_finite(value)]:
        name, value = infinite[0]
        raise ValueError(f"{record.bench} {record.key}: {name} is {value}, and a record holds finite numbers only")
    return json.dumps(vars(record), sort_keys=True, allow_nan=False) + "\n"


def parse_lines(path: Path) -> Iterator[Record]:
    """Yield the records of one file. Raises UserError for a line that is not a record, with its number."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            tree = json.loads(line)
        except ValueError as error:
            raise UserError(f"Line {number} of {path} is no record ({error}): the file is damaged.") from None
        if not isinstance(tree, dict):
            raise UserError(f"Line {number} of {path} is no record: it is {line[:40]!r}.")
        tree = _present(tree, "raw_scores", _FORMER_KEYS)
        yield build(Record, tree, key="", source=f"line {number} of {path}")


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest from a file or a run's folder. Raises UserError if there is none, or if it is malformed."""
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
    # An older manifest lacks these fields: leave them empty, since the defaults would describe this machine.
    tree = {"versions": {}, "hardware": {}, "commit": None} | tree
    for section, former in (("settings", _FORMER_KEYS), ("weights", _FORMER_KEYS), ("arguments", FORMER_ARGUMENTS)):
        tree = _present(tree, section, former)
    return build(Manifest, tree, key="", source=str(path))


def read_records(folder: str | Path) -> list[Record]:
    """Read the records of a finished run, in the order of their keys. Raises UserError if the run is not finished."""
    path = Path(folder) / RECORDS
    if not path.is_file():
        raise UserError(f"There is no {path}: the folder holds no run, or one that is not finished yet.")
    return list(parse_lines(path))


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read the summary of a finished run. Raises UserError if the run is not finished."""
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
    """Yield (dotted key, value) for every leaf of nested mappings."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree
