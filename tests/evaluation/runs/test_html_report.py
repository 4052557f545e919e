"""The page of a run: what it holds, that it needs nothing else, and what a browser makes of it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.browser import browse, in_a_browser
from unimm.config.schema import plain
from unimm.errors import UserError
from unimm.evaluation.runs.html_report import MAX_CARDS, write_report
from unimm.evaluation.runs.records import Manifest, Record, to_line
from unimm.runs.provenance import write_atomically

MASK = (45, 183, 255)  # of the style sheet
MARK = (0, 160, 60)  # a color that nothing else on the page has
HOSTILE = '<script>alert("x")</script>'


def run_folder(folder: Path, records: list[Record], bench: str = "toy", **summary: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(bench, "f" * 64, 7, {"protocol": {"name": "adm", "score_size": None}, "note": HOSTILE})
    write_atomically(folder / "manifest.json", json.dumps(plain(manifest)))
    write_atomically(folder / "records.jsonl", "".join(map(to_line, records)))
    write_atomically(folder / "summary.json", json.dumps(summary))
    return folder


def drawings(folder: Path, wrong: int, bench: str = "toy") -> Path:
    """Six drawings of a square, the first `wrong` of them wrong, with a box around it."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(6):
        image = Image.new("RGB", (48, 48), "white")
        ImageDraw.Draw(image).rectangle((8, 12, 31, 35), fill=MARK)
        image.save(folder / f"images/{number}.png")
        reason = "" if number >= wrong else f"expected square>=2, found 1\nno target for {HOSTILE} to be left of"
        seen = {
            "outline": [[8, 12, 32, 12, 32.0, 36, 8, 36.5]],
            "color_votes": {"red": 0.029, "green": 0.97, "b": 0.001},
        }
        boxes = [{"label": "square", "color": "green", "box": [8, 12, 32, 36], "score": 0.9, **seen}]
        boxes.append({"label": "dog", "box": [1, 1, 4, 4], "score": 0.1})
        inputs = {"prompt": f"two squares {HOSTILE}", "tag": ["counting", HOSTILE][number % 2]}
        records.append(
            Record(
                bench,
                f"{number}",
                seed=100 + number,
                inputs=inputs,
                output_path=f"images/{number}.png",
                raw_scores={"detections": boxes, "psnr": 20.0 + number},
                verdict=number >= wrong,
                reason=reason,
                scorer={"name": "detector", "sha256": "c" * 64},
            )
        )
    return run_folder(folder, records, bench)


class Tags(HTMLParser):
    """The elements of a page, and the words outside scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    drawings(folder / "a", wrong=2)
    drawings(folder / "b", wrong=4)
    return folder


def test_the_page_says_everything_and_needs_nothing(folder: Path) -> None:
    scores = write_report(folder / "a", folder / "a.html")
    assert [(score.name, score.samples) for score in scores] == [("correct", 6), ("psnr", 6)]
    page = (folder / "a.html").read_text()
    tags = Tags(page)
    assert len(tags.of("article")) == len(tags.of("img")) == len(tags.of("path")) == len(tags.of("rect")) / 2 == 6
    assert tags.of("path")[0] == {"d": "M8,12 L32,12 L32,36 L8,36.5Z"}
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in tags.of("img"))
    assert tags.of("rect")[0] | {"x": "8", "y": "12", "width": "24", "height": "24"} == tags.of("rect")[0]
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]+", "", page))
    assert not tags.of("link") and all("src" not in script for script in tags.of("script"))
    for said in (
        "66.7 %",
        "seed 105",
        "detector, sha256 cccccccccccc",
        "name: adm",
        "expected square>=2",
        "green square 0.90 (green 97%, red 3%), dog 0.10",
    ):
        assert said in tags.text, said


@pytest.mark.slow
def test_failed_ones_come_first_and_filters_name_their_rules(folder: Path) -> None:
    write_report(folder / "a", folder / "a.html")
    tags = Tags((folder / "a.html").read_text())
    assert ["data-failed" in card for card in tags.of("article")] == [True] * 2 + [False] * 4
    assert tags.of("article")[0]["data-rules"] == '["too few", "position"]'
    assert [button["data-filter"] for button in tags.of("button")] == ["", "failed", "rule: too few", "rule: position"]


def test_text_of_records_stays_text(folder: Path) -> None:
    write_report(folder / "a", folder / "a.html", folder / "b")
    page = (folder / "a.html").read_text()
    assert len(Tags(page).of("script")) == 1 and "<script>alert" not in page
    assert HOSTILE in Tags(page).text


def test_two_runs_are_compared(folder: Path) -> None:
    write_report(folder / "a", folder / "c.html", folder / "b")
    tags = Tags((folder / "c.html").read_text())
    assert "33.3 %" in tags.text and "+33.3 points" in tags.text and "Against b" in tags.text
    assert sum("data-changed" in card for card in tags.of("article")) == 2
    assert len(tags.of("img")) == 12


def compared_sets(folder: Path, fid: float, count: int = 50, sha256: str = "a" * 64) -> Path:
    figures = {"count": count, "count_reference": 50, "fid": fid, "kid": 0.00012359}
    record = Record("generation", "sets", raw_scores={"distances": figures})
    return run_folder(folder, [record], distances=figures, space={"name": "inception", "sha256": sha256})


def test_distances_of_sets_stand_beside_those_of_another_run_of_their_scale(tmp_path: Path) -> None:
    mine, theirs = compared_sets(tmp_path / "a", 1.5), compared_sets(tmp_path / "b", 2.25)
    for other, shown in (
        (theirs, "fid 2.25 1.5 kid 0.0001236 0.0001236"),
        (compared_sets(tmp_path / "c", 3.0, count=49), "fid not comparable 1.5 kid not comparable 0.0001236"),
        (compared_sets(tmp_path / "d", 3.0, sha256="b" * 64), "fid not comparable 1.5 kid not comparable 0.0001236"),
    ):
        assert write_report(mine, tmp_path / "page.html", other) == []
        said = Tags((tmp_path / "page.html").read_text()).text
        assert "50 images against 50 real ones, by\ninception, sha256 aaaaaaaaaaaa" in said
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", (tmp_path / "page.html").read_text())
        assert " ".join(cells).startswith(shown)
        assert "Scores" not in said and "count reference" not in said


def test_the_page_stays_light(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images/x.png")
    rows = [
        Record("toy", f"{n:04}", output_path="images/gone.png", raw_scores={"psnr": float(n)})
        for n in range(MAX_CARDS + 5)
    ]
    rows.append(Record("toy", "worst", output_path="images/x.png", raw_scores={"psnr": -1.0}))
    run_folder(tmp_path, rows)
    write_report(tmp_path, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert len(page) < 250_000 and page.count("<article") == MAX_CARDS
    assert page.count("data:image/jpeg;base64,") == 1  # the worst one is shown, and a lost image is said to be lost
    assert "images/gone.png is missing" in page


@in_a_browser
def test_a_filter_hides_what_does_not_fail_its_rule(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report(folder / "a", page)
    click = "<script>document.querySelector('[data-filter=\"rule: position\"]').click()</script></body>"
    page.write_text(page.read_text().replace("</body>", click))
    cards = Tags(browse(page, "--dump-dom")).of("article")
    assert ["hidden" in card for card in cards] == [False] * 2 + [True] * 4


@pytest.mark.slow
@in_a_browser
def test_a_browser_shows_images_boxes_and_bars(folder: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    write_report(folder / "a", tmp_path / "page.html")
    browse(tmp_path / "page.html", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)

    def like(color: tuple[int, int, int], tolerance: int = 12) -> np.ndarray:
        return abs(pixels - color).max(axis=-1) <= tolerance

    squares = like(tuple(round(0.88 * own + 0.12 * over) for own, over in zip(MARK, MASK, strict=True)))
    assert like(MARK, 2).sum() < 6 * 100  # each lies under its mask, which lets it through
    assert squares.sum() > 6 * 1000  # six squares of a quarter of an image, an image at least 100 px wide
    columns = np.flatnonzero(squares.any(axis=0))
    assert np.diff(columns).max() > 20  # side by side, with cards between them
    assert like((255, 45, 149), 30).sum() > 6 * 100  # the boxes around them
    assert like((251, 250, 248), 2).mean() > 0.3  # the page's own ground: its style sheet was read
    accent = (
        abs(pixels - (107, 131, 218)).max(axis=-1) <= 25
    )  # bars: the accent, three quarters opaque, on the line color
    assert accent.sum() > 500


def test_what_cannot_be_reported(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no .*manifest.json"):
        write_report(tmp_path, tmp_path / "x.html")
    with pytest.raises(UserError, match="without a single record"):
        write_report(run_folder(tmp_path / "empty", []), tmp_path / "x.html")
    other = drawings(tmp_path / "other", wrong=1, bench="another")
    with pytest.raises(UserError, match="a run of toy and .* one of another: they cannot be compared"):
        write_report(folder / "a", tmp_path / "x.html", other)
    (tmp_path / "other" / "summary.json").unlink()
    with pytest.raises(UserError, match="summary.json cannot be read .* is it finished"):
        write_report(other, tmp_path / "x.html")
    with pytest.raises(UserError, match="Cannot write the report"):
        write_report(folder / "a", folder / "a/manifest.json/x.html")
    assert not (tmp_path / "x.html").exists()
