"""Read and write GenEval's official image folders and result file.

    FOLDER/00000/metadata.jsonl          the prompt's line of metadata
    FOLDER/00000/samples/00000.png       images; any number of digits is read, five are written

Images of any model can be scored from such a folder, and the official scorer and `summary_scores.py` can read the files
that are written here.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.evaluation.geneval.prompts import Metadata, check_prompt
from unimm.evaluation.geneval.scorers import SanityImage, Scorer
from unimm.evaluation.runs.records import Key, Record
from unimm.runs.provenance import write_atomically

METADATA, SAMPLES = "metadata.jsonl", "samples"
_IMAGE = re.compile(r"(\d+)\.png")


class ImageFolder(NamedTuple):
    """A folder in the official layout: metadata per item, an image file per (item, sample)."""

    prompts: dict[str, Metadata]
    images: dict[Key, Path]

    def content(self) -> list[tuple[str, int, str]]:
        """Return (item, sample, sha256 of the file) of every image, which identifies the folder's content."""
        return [(*key, sha256(path.read_bytes()).hexdigest()) for key, path in sorted(self.images.items())]


def item_name(index: int) -> str:
    """Return the item, which is also the folder name, of the prompt with this index."""
    return f"{index:05d}"


def read_folder(folder: str | Path) -> ImageFolder:
    """Read the image paths and metadata of a folder in the official layout.

    Raises:
        UserError: the layout differs, metadata or images are missing, or two folders or images have one number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    places = sorted((place for place in folder.iterdir() if place.is_dir() and place.name.isdecimal()), key=_number)
    if not places:
        raise UserError(
            f"{folder} is no GenEval folder: it has no folders such as 00000 with {METADATA} and {SAMPLES}/00000.png."
        )
    prompts: dict[str, Metadata] = {}
    images: dict[Key, Path] = {}
    for place in places:
        item = item_name(_number(place))
        if item in prompts:
            raise UserError(f"{folder} has two folders with the number {_number(place)}: keep one of them.")
        prompts[item] = _metadata(place)
        for path in sorted((place / SAMPLES).glob("*.png")):
            if (match := _IMAGE.fullmatch(path.name)) is None:
                continue
            key = item, int(match[1])
            if key in images:
                raise UserError(f"{images[key]} and {path.name} are one sample, {key[1]}: keep one of them.")
            images[key] = path
        if not any(key[0] == item for key in images):
            raise UserError(f"{place / SAMPLES} holds no image with a name such as 00000.png.")
    return ImageFolder(prompts, images)


def write_folder(target: str | Path, prompts: Mapping[str, Metadata], images: Mapping[Key, Path]) -> Path:
    """Copy images into the official layout, metadata last: a folder with metadata is complete.

    Raises:
        UserError: the target is not empty or cannot be written to.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--export {target} is not an empty folder: choose another, nothing is overwritten.")
    try:
        for (item, sample), path in sorted(images.items()):
            place = target / item / SAMPLES
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / f"{sample:05d}.png")
        for item in dict.fromkeys(item for item, _ in sorted(images)):
            write_atomically(target / item / METADATA, json.dumps(prompts[item]) + "\n")
    except OSError as error:
        raise UserError(f"Cannot write the images into {target}: {error.strerror or error}.") from None
    return target


def official_results(records: Iterable[Record], scorer: Scorer) -> str:
    """Format records as the official result lines (filename, tag, prompt, correct, reason, metadata, details)."""
    lines = []
    for record in records:
        objects = scorer.objects(record.inputs, record.raw_scores.get("detections", []))
        details = {
            name: [[*each.box.tolist(), float(each.score)] for each in objects[name]]
            for name in scorer.class_names
            if name in objects
        }
        row: dict[str, Any] = {
            "filename": record.output_path,
            "tag": record.inputs["tag"],
            "prompt": record.inputs["prompt"],
            "correct": bool(record.verdict),
            "reason": record.reason,
            "metadata": json.dumps(record.inputs),
            "details": json.dumps(details),
        }
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def read_sanity_images(folder: str | Path) -> list[SanityImage]:
    """Read a user's known images: the official layout, with `"expected": true` or false in each metadata.jsonl.

    Raises:
        UserError: the layout differs, or a metadata.jsonl has no `expected`.
    """
    images = read_folder(folder)
    known = []
    for (item, sample), path in sorted(images.images.items()):
        metadata = images.prompts[item]
        if not isinstance(metadata.get("expected"), bool):
            raise UserError(f'{folder}/{item}: its metadata.jsonl needs "expected": true or false, the right verdict.')
        known.append(SanityImage(f"{item}/{sample}", load_image(path), metadata, metadata["expected"]))
    return known


def _metadata(place: Path) -> Metadata:
    path = place / METADATA
    if not path.is_file():
        raise UserError(f"{place} has no {METADATA}: it says what its images should show.")
    return check_prompt(path.read_text(encoding="utf-8"), str(path))


def _number(place: Path) -> int:
    return int(place.name)
