"""DPG-Bench: draw the prompts or read a folder of 2 x 2 grids, and ask a VQA model every question about every image.

An image depends only on its prompt, its sample number and the run's seed, and a prompt's images are always drawn
together, so interruptions and the number of processes do not change results. A record holds the question rows and the
answers as written, so the scores of `rules.py` are pure functions of the records. A run uses one VQA model.
"""

import csv
import functools
import hashlib
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm.auto import tqdm

from unimm.data.image_files import save_image_atomically
from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.evaluation.dpg.arguments import BENCH, GET_CSV
from unimm.evaluation.dpg.rules import COLUMNS, COMPAT, FIXED, PLAIN, Rule, read_questions, summarize
from unimm.evaluation.metrics.bootstrap import bootstrap_mean
from unimm.evaluation.runs.bad_images import each_or_error, judged_or_error
from unimm.evaluation.runs.records import unreadable, unreadable_names
from unimm.evaluation.runs.store import Key, Record, RunStore
from unimm.evaluation.vqa import Judge

OFFICIAL_CSV = "98457fc9901943f51ff9a30367250fc292533bed"  # git blob hash of the published dpg_bench.csv
GRID_SIDE = 2

Rows = list[dict[str, Any]]  # rows of the question file, each with its index as `row`


@dataclass(frozen=True)
class Prompts:
    """Prompts by item, their question rows, and the git blob hash of the question file."""

    texts: dict[str, str]
    rows: dict[str, Rows] = field(default_factory=dict)
    blob: str | None = None

    def limited(self, limit: int | None) -> "Prompts":
        """Return the first `limit` prompts of the file."""
        kept = dict(list(self.texts.items())[:limit])
        return Prompts(kept, {item: rows for item, rows in self.rows.items() if item in kept}, self.blob)


def read_question_file(path: str | Path) -> Prompts:
    """Read the prompts and questions of a dpg_bench.csv.

    Raises:
        UserError: the file is missing (the message says what to download) or is not a question file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no question file {path}: get {GET_CSV}; git hash-object gives {OFFICIAL_CSV}.")
    content = path.read_bytes()
    try:
        lines = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file: {error}.") from error
    missing = [name for name in (*COLUMNS, "text") if name not in (lines[0] if lines else {})]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}, or no rows: get {GET_CSV}.")
    read_questions(lines)  # validate the questions before anything is drawn
    texts: dict[str, str] = {}
    rows: dict[str, Rows] = {}
    for index, line in enumerate(lines):
        texts.setdefault(line["item_id"], line["text"])
        rows.setdefault(line["item_id"], []).append({"row": index, **{name: line[name] for name in COLUMNS}})
    return Prompts(texts, rows, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def read_prompts(path: str | Path) -> Prompts:
    """Read prompts without questions, lines of {"item_id": ..., "prompt": ...}. Raise UserError for other files."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        texts = {str(line["item_id"]): str(line["prompt"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as lines of item_id and prompt: {error!r}.") from error
    if not texts or len(texts) < len(lines):
        raise UserError(f"{path} holds {len(lines)} lines and {len(texts)} different prompts.")
    return Prompts(texts)


class Images(Protocol):
    """A source of images: drawn by a model or read from grids."""

    keys: list[Key]

    def load(self, block: Sequence[Key]) -> list[tuple[Path, Image.Image | UserError]]:
        """Return each image's file together with the image, or with the error if it cannot be read."""
        ...

    def seed(self, key: Key) -> int:
        """Return the seed that the image was drawn with, 0 if unknown."""
        ...


class GridImages:
    """Images from a folder in the official layout: ITEM.png, a grid of 2 x 2 images of `resolution` pixels each. A file
    that cannot be read leads to records with that reason.

    Raises:
        UserError: files are missing (without `allow_missing`), no file can be read, or a grid has another size.
    """

    def __init__(
        self, folder: str | Path, prompts: Prompts, resolution: int, num_images: int, *, allow_missing: bool = False
    ) -> None:
        if not 1 <= num_images <= GRID_SIDE**2:
            raise UserError(f"A grid holds up to {GRID_SIDE**2} images, not {num_images}.")
        self.folder, self.resolution = Path(folder), resolution
        present = [item for item in prompts.texts if self._path(item).is_file()]
        self.missing = sorted(set(prompts.texts) - set(present))
        if not present or (self.missing and not allow_missing):
            named = ", ".join(f"{item}.png" for item in self.missing[:5])
            raise UserError(
                f"{folder} lacks {len(self.missing)} of {len(prompts.texts)} grids ({named}, ...): draw them, or count "
                "them as missing with --allow-missing."
            )
        self.keys = [(item, sample) for item in present for sample in range(num_images)]
        read = each_or_error([self._path(item) for item in present], load_image)
        if all(isinstance(grid, UserError) for grid in read):
            raise UserError(f"None of {len(present)} grids in {folder} can be read; the first: {read[0]}")
        for item, grid in zip(present, read, strict=True):
            if not isinstance(grid, UserError):
                self._check_size(item, grid)  # fail before the first question is asked

    def load(self, block: Sequence[Key]) -> list[tuple[Path, Image.Image | UserError]]:
        items = list(dict.fromkeys(item for item, _ in block))
        grids = dict(zip(items, each_or_error([self._path(item) for item in items], load_image), strict=True))
        return [(self._path(item), self._cut(grids[item], sample)) for item, sample in block]

    def _cut(self, grid: Image.Image | UserError, sample: int) -> Image.Image | UserError:
        return grid if isinstance(grid, UserError) else grid.crop(self._box(sample))

    def seed(self, key: Key) -> int:
        return 0

    def content(self) -> Iterable[str]:
        """Yield each grid's item and sha256."""
        for item in dict.fromkeys(item for item, _ in self.keys):
            yield f"{item} {hashlib.sha256(self._path(item).read_bytes()).hexdigest()}"

    def _path(self, item: str) -> Path:
        return self.folder / f"{item}.png"

    def _box(self, sample: int) -> tuple[int, int, int, int]:
        left, top = sample % GRID_SIDE * self.resolution, sample // GRID_SIDE * self.resolution
        return left, top, left + self.resolution, top + self.resolution

    def _check_size(self, item: str, grid: Image.Image) -> None:
        side = GRID_SIDE * self.resolution
        if grid.size != (side, side):
            raise UserError(
                f"{self._path(item)} has {grid.width} x {grid.height} pixels; a grid of images of {self.resolution} "
                f"has {side} x {side}: give the side of one image as --resolution."
            )


def judge_images(store: RunStore, images: Images, prompts: Prompts, judge: Judge | None) -> dict[str, Any]:
    """Ask the questions about every image without a record, finish the run and return its summary.

    Without a `judge` (the VQA model), images are drawn and nothing is asked.
    """
    described = {} if judge is None else judge.describe()
    size = len({sample for _, sample in images.keys})
    for block in tqdm(store.split_blocks(images.keys, size), desc="DPG", unit="prompt"):
        start, loaded = time.perf_counter(), images.load(block)
        rows = prompts.rows.get(block[0][0], [])  # a block holds the images of one prompt
        found = judged_or_error([image for _, image in loaded], functools.partial(_ask, judge, rows))
        for key, (path, _), scores in zip(block, loaded, found, strict=True):
            if key in store.done:
                continue
            item, sample = key
            record = Record(
                BENCH,
                item,
                sample,
                seed=images.seed(key),
                inputs={"prompt": prompts.texts[item], "rows": rows},
                output_path=str(path),
                raw_scores=_unanswered(rows) if isinstance(scores, UserError) else scores,
                reason=unreadable(scores) if isinstance(scores, UserError) else "",
                judge=described,
            )
            store.append(record, seconds=(time.perf_counter() - start) / size)
    return store.finish(summarize_records)


def summarize_records(records: Sequence[Record]) -> dict[str, Any]:
    """Return `official-compat`, `fixed` and `plain`, each with `dpg`, its interval (resampling prompts), categories,
    dropped prompts, and the number of `unparsed` answers: neither yes nor no by the rule, or guessed by the VQA model.

    Raises:
        UserError: the records come from more than one VQA model.
    """
    if len(judges := {json.dumps(record.judge, sort_keys=True) for record in records}) > 1:
        raise UserError(f"These records come from {len(judges)} judges, whose figures are no one scale: one run each.")
    counted: dict[str, Any] = {"pictures": len(records), "prompts": len({record.item for record in records})}
    counted["unreadable"] = unreadable_names(records)
    if not any(record.raw_scores for record in records):
        return counted
    rows = {row["row"]: row for record in records for row in record.inputs["rows"]}
    ordered = [rows[index] for index in sorted(rows)]
    figures = {rule.name: _figures(ordered, records, rule) for rule in (COMPAT, FIXED, PLAIN)}
    return counted | {"judge": records[0].judge} | figures


def table(summary: Mapping[str, Any]) -> str:
    """Format the summary: the VQA model, then the three rules side by side."""
    if FIXED.name not in summary:
        return f"{summary['pictures']} images of {summary['prompts']} prompts"
    rules, judge = [summary[rule.name] for rule in (COMPAT, FIXED, PLAIN)], summary["judge"]
    lost = summary["unreadable"]
    lines = [f"{len(lost)} images cannot be read, of {', '.join(dict.fromkeys(lost))}"] if lost else []
    lines += [f"judge {judge['name']} ({judge['kind']}, {judge['version']}, sha256 {judge['sha256'][:12]})"]
    lines += [f"{'':<28}" + "".join(f"{rule.name:>16}" for rule in (COMPAT, FIXED, PLAIN))]
    lines += [f"{'DPG':<28}" + "".join(_two_digits(each["dpg"]) for each in rules)]
    for count in ("prompts", "unparsed"):
        lines += [f"{count:<28}" + "".join(f"{each[count]:>16}" for each in rules)]
    for level in ("level1", "categories"):
        for name in summary[FIXED.name][level]:
            lines += [f"{name:<28}" + "".join(_two_digits(each[level].get(name)) for each in rules)]
    return "\n".join(lines)


def _two_digits(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>16}"


def write_grids(folder: Path, paths: Mapping[Key, Path]) -> Path:
    """Write the images as official 2 x 2 grids, ITEM.png in `folder`; cells without a readable image are black."""
    by_item: dict[str, list[Path]] = {}
    for (item, _), path in sorted(paths.items()):
        by_item.setdefault(item, []).append(path)
    for item, files in by_item.items():
        images = each_or_error(files[: GRID_SIDE**2], load_image)
        sizes = [image.size for image in images if not isinstance(image, UserError)]
        if not sizes:
            continue
        width, height = sizes[0]
        grid = Image.new("RGB", (GRID_SIDE * width, GRID_SIDE * height))
        for sample, image in enumerate(images):
            if isinstance(image, UserError):
                continue
            grid.paste(image, (sample % GRID_SIDE * width, sample // GRID_SIDE * height))
        save_image_atomically(grid, folder / f"{item}.png")
    return folder


def _unanswered(rows: Rows) -> dict[str, Any]:
    """Return the scores of an unreadable image: an empty answer to every question, which every rule counts as no."""
    return {"answers": {str(int(row["proposition_id"])): "" for row in rows}} if rows else {}


def _ask(judge: Judge | None, rows: Rows, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Return the scores of each image, asked separately from the others."""
    return [{} if judge is None else _answers_about(judge, image, rows) for image in images]


def _answers_about(judge: Judge, image: Image.Image, rows: Rows) -> dict[str, Any]:
    asked = judge.answer_yes_no([image] * len(rows), [row["question_natural_language"] for row in rows])
    numbers = [str(int(row["proposition_id"])) for row in rows]
    scores: dict[str, Any] = {"answers": {n: each.answer for n, each in zip(numbers, asked, strict=True)}}
    if asked and asked[0].probability is not None:
        scores["probabilities"] = {n: each.probability for n, each in zip(numbers, asked, strict=True)}
    if guessed := [n for n, each in zip(numbers, asked, strict=True) if each.guessed]:
        scores["guessed"] = guessed
    return scores


def _answers(records: Sequence[Record], rule: Rule) -> tuple[dict[str, list[dict[int, str]]], int]:
    """Return the answers about every image of each prompt, and how many of them are unparsed. A guessed answer counts
    for the other rules, but is empty for `PLAIN`."""
    answers, unparsed = dict[str, list[dict[int, str]]](), 0
    for record in sorted(records, key=lambda record: record.key):
        given, guessed = record.raw_scores["answers"], record.raw_scores.get("guessed", [])
        unparsed += sum(number in guessed or not rule.is_parsed(answer) for number, answer in given.items())
        kept = {int(n): "" if rule is PLAIN and n in guessed else answer for n, answer in given.items()}
        answers.setdefault(record.item, []).append(kept)
    return answers, unparsed


def _figures(rows: Rows, records: Sequence[Record], rule: Rule) -> dict[str, Any]:
    answers, unparsed = _answers(records, rule)
    # The records may cover only some prompts, but COMPAT skips a row only if it is the first of the whole file.
    questions = read_questions(rows, rule, first_row=rows[0]["row"])
    lost = [item for item in answers if item not in questions]  # its only question stood in the first row
    figures = summarize(questions, {item: each for item, each in answers.items() if item not in lost}, rule)
    scores = figures.pop("scores")
    figures["interval"] = None
    if scores:
        interval = bootstrap_mean([100 * score for score in scores.values()], list(scores))
        figures["interval"] = {"low": interval.low, "high": interval.high}
    return figures | {"dropped": figures["dropped"] + lost, "unparsed": unparsed}
