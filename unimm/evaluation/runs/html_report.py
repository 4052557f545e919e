"""The HTML report of an evaluation run: one self-contained file, written without a model or network access.

It shows scores with their intervals, scorer and protocol; bars per tag; distances between whole sets; the samples,
failed and worst ones first, with boxes, masks, color votes, seeds and reasons, filterable by the failed rule; and, with
a second run, paired differences. Images are small data URIs, and at most `MAX_CARDS` samples per part are shown, which
keeps the file small. The template escapes all text that comes from records.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from unimm.config.schema import plain
from unimm.errors import UserError
from unimm.evaluation.geneval.rules import failed_rule
from unimm.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Difference, Interval
from unimm.evaluation.runs.html import base_style, data_uri
from unimm.evaluation.runs.measures import (
    SHARES,
    VERDICT,
    Measure,
    compare,
    described,
    measures,
    part_of,
    tag_of,
)
from unimm.evaluation.runs.records import Key, Manifest, Record, leaves, read_manifest, read_records, read_summary
from unimm.runs.provenance import write_atomically

MAX_CARDS = 240
THUMBNAIL_SIDE = 224
SHOWN_NUMBERS = 5  # per sample; the records hold all of them
SHOWN_VOTES, LEAST_VOTE = 3, 0.01  # colors per object, and the smallest share that is shown
SET_SIZES = ("count", "count_reference")  # sizes of the compared sets
WORST_BY = "psnr"  # sorts samples without a verdict, lowest first


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    folder: Path
    manifest: Manifest
    records: list[Record]
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Read a run. Raises UserError if there is none, or if it is unfinished or empty."""
        run = cls(Path(folder), read_manifest(folder), read_records(folder), read_summary(folder))
        if not run.records:
            raise UserError(f"{folder} holds a run without a single record: there is nothing to report.")
        return run

    @property
    def distances(self) -> dict[str, float]:
        """Return the distances between two whole sets of images, if the run compared any; no means over records."""
        found = self.summary.get("distances") or {}
        return {name: value for name, value in found.items() if not isinstance(value, list)}

    @property
    def space(self) -> dict[str, Any]:
        """Return the feature space of the distances; distances in two spaces are not comparable."""
        return self.summary.get("space") or {}

    @property
    def protocol(self) -> str:
        """Return the protocol of the scores in a few words; without one, all settings but the scorer's (shown in a
        column of its own)."""
        settings = {name: value for name, value in self.manifest.settings.items() if name != "scorer"}
        named = settings.get("protocol", settings)
        if isinstance(named, str):
            return named
        return ", ".join(f"{words(name)}: {value}" for name, value in leaves(named) if value is not None)


def write_report(folder: str | Path, output: str | Path, against: str | Path | None = None) -> list[Measure]:
    """Write the report of the run in `folder`, optionally compared with the run in `against`, and return the scores.

    Raises:
        UserError: a folder has no finished run, or the runs are of different benchmarks.
    """
    run, other = Run.read(folder), None if against is None else Run.read(against)
    if other is not None and other.manifest.bench != run.manifest.bench:
        raise UserError(
            f"{folder} is a run of {run.manifest.bench} and {against} one of {other.manifest.bench}: they cannot be "
            "compared."
        )
    scores = measures(run.records)
    page = render(run, scores, other)
    write_atomically(output, page, "report")
    return scores


def render(run: Run, scores: Sequence[Measure], other: Run | None = None) -> str:
    """Render the report as HTML text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "described": described,
        "figure": figure,
        "signed": signed,
        "span": span,
        "spread": spread,
        "words": words,
    }
    template = resources.files("unimm.evaluation.runs").joinpath("report.html").read_text(encoding="utf-8")
    comparisons = [] if other is None else compare(other.records, run.records)
    cards = list(_cards(run, other))
    return environment.from_string(template).render(
        run=run,
        other=other,
        style=Markup(base_style()),
        scores=scores,
        parts=any(score.part for score in scores),
        distances=_distances(run, other),
        comparisons=comparisons,
        only=None if other is None else _only(run.records, other.records),
        cards=cards,
        total=sum(map(_worth_showing, run.records)),
        rules=Counter(rule for card in cards for rule in card["rules"]),
        tags=list(dict.fromkeys(card["tag"] for card in cards if card["tag"])),
        facts=_facts(run, other),
        level=f"{LEVEL:.0%}",
        resamples=RESAMPLES,
    )


def words(name: str) -> str:
    """Return an identifier as words."""
    return name.replace("_", " ")


def figure(value: float, name: str = "") -> str:
    """Format a number for display: verdicts in percent, others with two or three decimals."""
    if name in SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def signed(value: float, name: str = "") -> str:
    """Format a difference with its sign; differences of shares in percentage points."""
    return f"{100 * value:+.1f} points" if name in SHARES else f"{value:+.3f}"


def span(found: Interval | Difference, name: str = "") -> str:
    """Format the interval of a measure or a difference, or say that there is none."""
    if found.low is None or found.high is None:
        return "too few clusters"
    shown = signed if isinstance(found, Difference) else figure
    return f"{shown(found.low, name)} to {shown(found.high, name)}"


def spread(found: Interval) -> str:
    """Return a share's value and interval as CSS variables, for its bar."""
    low, high = (found.value if end is None else end for end in (found.low, found.high))
    return f"--value: {100 * found.value:.2f}%; --low: {100 * low:.2f}%; --high: {100 * high:.2f}%"


def rules_of(record: Record) -> list[str]:
    """Return the rules that a record fails, in a word or two each: GenEval's, or the text before a reason's colon."""
    lines = record.reason.splitlines()
    return list(dict.fromkeys(failed_rule(line) or line.partition(":")[0][:32] for line in lines))


def _distances(run: Run, other: Run | None) -> list[tuple[str, float, float | None]]:
    """Return name, value, and the other run's value if both are comparable: same feature space, same set sizes."""
    alike = other is not None and (other.space, _sizes(other)) == (run.space, _sizes(run))
    theirs = other.distances if other is not None and alike else {}
    return [(name, value, theirs.get(name)) for name, value in run.distances.items() if name not in SET_SIZES]


def _sizes(run: Run) -> list[float | None]:
    return [run.distances.get(name) for name in SET_SIZES]


# ---- samples ---------------------------------------------------------------------------------------------------------


def _cards(run: Run, other: Run | None) -> Iterable[dict[str, Any]]:
    """Yield the samples of each part that are shown, failed and worst ones first."""
    theirs = {} if other is None else {record.key: record for record in other.records}
    for part in dict.fromkeys(map(part_of, run.records)):
        members = sorted((r for r in run.records if part_of(r) == part and _worth_showing(r)), key=_badness)
        for record in islice(members, MAX_CARDS):
            yield _card(run, record, other, theirs.get(record.key))


def _worth_showing(record: Record) -> bool:
    return record.verdict is not None or record.output_path is not None or record.is_unreadable


def _badness(record: Record) -> tuple[float, float, Key]:
    verdict = 0.0 if record.verdict is None else float(record.verdict)
    return verdict, float(record.raw_scores.get(WORST_BY, 0.0)), record.key


def _card(run: Run, record: Record, other: Run | None, theirs: Record | None) -> dict[str, Any]:
    numbers = {name: value for name, value in record.raw_scores.items() if isinstance(value, int | float)}
    images = [_image(run, record.inputs.get("original_path"), "original", [])]
    images.append(_image(run, record.output_path, "this run", record.raw_scores.get("detections", [])))
    if other is not None and theirs is not None:
        boxes = theirs.raw_scores.get("detections", [])
        images.append(_image(other, theirs.output_path, "other run", boxes))
    inputs = record.inputs
    return {
        "name": f"{record.item} #{record.sample}",
        "part": part_of(record),
        "tag": tag_of(record),
        "asked": inputs.get("prompt") or inputs.get("question"),
        "answer": record.raw_scores.get("answer"),
        "expected": inputs.get("expected"),
        "images": [image for image in images if image is not None],
        "numbers": [(name, figure(value)) for name, value in islice(numbers.items(), SHOWN_NUMBERS)],
        "detections": [_detection(item) for item in record.raw_scores.get("detections", [])],
        "failed": record.verdict is not None and record.verdict < 1,
        "verdict": _verdict(record),
        "changed": theirs is not None and theirs.verdict != record.verdict,
        "other_verdict": None if theirs is None else _verdict(theirs),
        "reasons": record.reason.splitlines(),
        "rules": rules_of(record),
        "seed": record.seed,
        "scorer": record.scorer.get("name"),
    }


def _verdict(record: Record) -> str | None:
    if record.verdict is None:
        return None
    if isinstance(record.verdict, bool):
        return "right" if record.verdict else "wrong"
    return figure(record.verdict, VERDICT)


def _image(run: Run, path: str | None, label: str, detections: Sequence[Any]) -> dict[str, Any] | None:
    """Return a thumbnail with boxes and outlines in pixels of the original image; None if no image was kept."""
    if path is None:
        return None
    try:
        with Image.open(run.folder / path) as image:
            raw_image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises on damaged files
        return {"label": f"{label}: {path} is missing or damaged", "uri": None, "boxes": []}
    boxes = [
        {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "title": _detection(item), "outline": _outline(item)}
        for item in detections
        for x1, y1, x2, y2 in [item["box"][:4]]
    ]
    uri = data_uri(raw_image, longest_side=THUMBNAIL_SIDE)
    return {"label": label, "uri": uri, "boxes": boxes, "width": raw_image.width, "height": raw_image.height}


def _detection(item: dict[str, Any]) -> str:
    words = [str(item[name]) for name in ("color", "label") if item.get(name) is not None]
    votes = sorted(item.get("color_votes", {}).items(), key=lambda vote: -vote[1])[:SHOWN_VOTES]
    shown = ", ".join(f"{color} {share:.0%}" for color, share in votes if share >= LEAST_VOTE)
    return f"{' '.join(words)} {item['score']:.2f}" + (f" ({shown})" if shown else "")


def _outline(item: dict[str, Any]) -> str:
    """Return the mask's outline as an SVG path, empty if no mask was kept."""
    polygons = [zip(flat[::2], flat[1::2], strict=True) for flat in item.get("outline", [])]
    return " ".join("M" + " L".join(f"{x:g},{y:g}" for x, y in polygon) + "Z" for polygon in polygons)


# ---- facts -----------------------------------------------------------------------------------------------------------


def _facts(run: Run, other: Run | None) -> list[tuple[str, str, str | None]]:
    """Return all entries of the manifests: key, value, and the other run's value if it differs."""
    mine, theirs = _facts_of(run), {} if other is None else _facts_of(other)
    keys = dict.fromkeys([*mine, *theirs])
    return [
        (key, mine.get(key, "-"), None if other is None or mine.get(key) == theirs.get(key) else theirs.get(key, "-"))
        for key in keys
    ]


def _facts_of(run: Run) -> dict[str, str]:
    return {"folder": run.folder.name} | {name: str(value) for name, value in leaves(plain(run.manifest))}


def _only(first: Sequence[Record], second: Sequence[Record]) -> tuple[int, int]:
    """Return how many samples are in the first run only, and in the second only."""
    ours, theirs = ({record.key for record in records} for records in (first, second))
    return len(ours - theirs), len(theirs - ours)
