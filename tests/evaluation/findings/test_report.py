"""The report of recorded figures, and the page that it is written into."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimm.errors import UserError
from unimm.evaluation.findings.page import write_report
from unimm.evaluation.findings.plan import Table, load_tables
from unimm.evaluation.findings.report import gathered
from unimm.evaluation.findings.run import Place, cell_digest, read_cell
from unimm.evaluation.findings.verdict import Figure

TABLE = """
title: A table
paper: the paper, table 1
note: small
figures: [psnr, use]
measures: {source: shapes}
minutes: 2
legs: {tokenizer: {recipe: tokenizer}}
cells:
  one: {label: the first, paper: 20 dB}
  two: {label: the second, set: {tokenizer: {model.kind: ideal}}}
claims:
  - {text: the first is better, paper: 20 dB, figure: psnr, higher: one, lower: two}
  - {text: all codes are used, paper: 100 %, figure: use, higher: one, lower: 0.95}
"""
PAGE = "# Findings\n\n<!-- findings x -->\nold\n<!-- end of findings x -->\nthe end\n"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/x.yaml").write_text(TABLE, encoding="utf-8")
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    return Place(tmp_path / "out", tmp_path / "configs", tmp_path)


def record(place: Place, table: Table, cell: str, seed: int, psnr: float, use: float) -> None:
    folder = place.cell("x", cell, seed)
    folder.mkdir(parents=True)
    figures = {"psnr": [psnr, psnr - 0.2, psnr + 0.2], "use": [use, None, None]}
    content = {"figures": figures, "settings": cell_digest(table, cell, seed, place.configs)}
    (folder / "cell.json").write_text(json.dumps(content), encoding="utf-8")
    Image.fromarray(np.full((8, 16, 3), seed, np.uint8)).save(folder / "panel.png")


def test_a_page_without_results_says_so(place: Place, tmp_path: Path) -> None:
    assert write_report(place, load_tables(place.configs), tmp_path / "page.md") == [tmp_path / "page.md"]
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (
        "# Findings\n\n<!-- findings x -->\n\nthe paper, table 1. small\n\n"
        "| cell | the paper | PSNR (dB) | codes used |\n| --- | --- | --- | --- |\n"
        "| the first | 20 dB | not run yet | not run yet |\n| the second | - | not run yet | not run yet |\n\n"
        "| claim | the paper | ours | direction |\n| --- | --- | --- | --- |\n"
        "| the first is better | 20 dB | not run yet | **not run yet** |\n"
        "| all codes are used | 100 % | not run yet | **not run yet** |\n\n<!-- end of findings x -->\nthe end\n"
    )


def test_recorded_figures_become_tables_verdicts_plots_and_panels(place: Place, tmp_path: Path) -> None:
    table = load_tables(place.configs)["x"]
    record(place, table, "one", 1, 20.0, 1.0)
    record(place, table, "two", 1, 10.0, 0.5)
    write_report(place, {"x": table}, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| the first | 20 dB | 20 (one seed) | 100.0 % (one seed) |" in text and text.count("**undecided**") == 2
    record(place, table, "one", 2, 20.5, 1.0)
    record(place, table, "two", 2, 10.1, 0.6)
    written = write_report(place, {"x": table}, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| the first | 20 dB | 20, 20.5 [19.5 to 21] | 100.0 %, 100.0 % [100.0 % to 100.0 %] |" in text
    assert "| the second | - | 10, 10.1 [9.8 to 10.3] | 50.0 %, 60.0 % [40.0 % to 70.0 %] |" in text
    assert "| the first is better | 20 dB | PSNR (dB): 20.2 against 10.1 | **agreed** |" in text
    assert "| all codes are used | 100 % | codes used: 100.0 % against 95.0 % | **agreed** |" in text
    assert "![Table x:" in text and text.endswith("<!-- end of findings x -->\nthe end\n")
    plot, panel = (Image.open(path) for path in written[1:])
    assert np.asarray(plot.convert("L")).std() > 5  # something is drawn
    colors = np.asarray(panel.convert("RGB"))[:, 0, 0].tolist()
    assert colors == [1] * 16 + [255] * 8 + [1] * 16  # both cells' first seeds, enlarged, with a line between


def test_plots_ask_for_matplotlib(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load_tables(place.configs)["x"]
    record(place, table, "one", 1, 20.0, 1.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"matplotlib, which is not installed: install unimm\[eval\]"):
        write_report(place, {"x": table}, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE


def test_what_does_not_belong_is_refused(place: Place, tmp_path: Path) -> None:
    table = load_tables(place.configs)["x"]
    record(place, table, "one", 1, 20.0, 1.0)
    other = place.configs / "x.yaml"
    other.write_text(TABLE.replace("source: shapes", "source: elsewhere"), encoding="utf-8")
    with pytest.raises(UserError, match="measured under other settings than x.yaml has: remove"):
        read_cell(place, "x", load_tables(place.configs)["x"], "one", 1)
    (place.cell("x", "one", 1) / "cell.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="The figures"):
        read_cell(place, "x", table, "one", 1)
    (tmp_path / "page.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(UserError, match="lacks the lines <!-- findings x -->"):
        write_report(Place(tmp_path / "empty", place.configs, tmp_path), {"x": table}, tmp_path / "page.md")


def test_the_interval_of_a_share_stays_between_nothing_and_all() -> None:
    found = gathered({"one": [{"use": Figure(0.9, None, None)}, {"use": Figure(0.6, None, None)}]})["one"]["use"]
    assert found.values == (0.9, 0.6) and found.low == pytest.approx(0.3) and found.high == 1.0
    found = gathered({"one": [{"psnr": Figure(0.9, None, None)}, {"psnr": Figure(0.6, None, None)}]})["one"]["psnr"]
    assert found.high == pytest.approx(1.2)
