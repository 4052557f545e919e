"""Image folders with captions: `name.txt` next to `name.jpg`, or a `metadata.jsonl` as in Hugging Face's imagefolder
({"file_name": "name.jpg", "text": ...}, in the folder or its subfolders)."""

import json
from pathlib import Path
from typing import Any

from unimm.data.bad_rows import BadRow
from unimm.data.shuffling import Rows
from unimm.data.sources.rows import ReadOptions
from unimm.errors import UserError, printable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"


class FolderImages(Rows):
    """A data set of all images below a folder, sorted by path; rows are `{"image", "text", "key"}`,
    with the path of the edited image as `options.target_column` if metadata.jsonl names one. In ImageNet's layout, one
    subfolder for each class, `label` is the number of the subfolder in alphabetical order (`classes`).

    Raises:
        UserError: there is no image, or a metadata.jsonl cannot be read.
    """

    def __init__(self, folder: Path, options: ReadOptions | None = None) -> None:
        self.folder, self.options = folder, options or ReadOptions()
        files = sorted(path for path in folder.rglob("*") if not path.is_dir())
        self.paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if not self.paths:
            raise UserError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        tops = [path.relative_to(folder).parts for path in self.paths]
        self.classes = sorted({parts[0] for parts in tops}) if all(len(parts) > 1 for parts in tops) else []
        self.captions: dict[Path, Any] = {}
        self.targets: dict[Path, Path] = {}
        for path in files:
            if path.name == METADATA:
                rows = _metadata(path)
                named = {image: row for image, row in rows.items() if self.options.text_column in row}
                self.captions |= {image: row[self.options.text_column] for image, row in named.items()}
                self.targets |= _targets(rows, self.options.target_column)
        if self.targets:  # the edited images are no rows of their own
            edited = set(self.targets.values())
            self.paths = [path for path in self.paths if path not in edited or path in self.targets]
            self.column_names = (self.options.target_column,)
        if not self.captions and not any(path.suffix == ".txt" for path in files):
            self.caption_gap = f"no image of it has a .txt beside it, and there is no {METADATA}"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        image = self.options.image(path, str(path))
        name = printable(path.relative_to(self.folder).as_posix())
        target = {self.options.target_column: self.targets[path]} if path in self.targets else {}
        return {"image": image, "text": self._caption(path), "key": name, **self._label(path), **target}

    def _label(self, path: Path) -> dict[str, int]:
        return {"label": self.classes.index(path.relative_to(self.folder).parts[0])} if self.classes else {}

    def _caption(self, path: Path) -> str:
        if path in self.captions:
            return self.options.caption(self.captions[path], str(path))
        if self.caption_gap is not None:
            return ""
        try:
            return path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise BadRow("wrong caption", f"{path.with_suffix('.txt')} cannot be read: {error}") from None


def _targets(rows: dict[Path, dict[str, Any]], column: str) -> dict[Path, Path]:
    """Return {image path: path of the edited image} of the rows that name one."""
    return {image: image.parent / row[column] for image, row in rows.items() if isinstance(row.get(column), str)}


def _metadata(path: Path) -> dict[Path, dict[str, Any]]:
    """Read {image path: row} from one metadata.jsonl."""
    rows: dict[Path, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error.msg} in column {error.colno}.") from None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"{path}, line {number} has no file_name: {line[:60]!r}.")
        rows[path.parent / row["file_name"]] = row
    return rows
