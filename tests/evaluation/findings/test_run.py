"""Tables in small: trained by the recipes in this process, killed, resumed, measured and listed."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from eval.findings import main
from tests.conftest import ROOT
from unimm.errors import Interrupted, UserError
from unimm.evaluation.findings.plan import Table, load_tables
from unimm.evaluation.findings.run import Place, read_cell, run_cell, states, train
from unimm.training.loop.checkpoint import save_checkpoint
from unimm.training.tokenizer import trainer

TABLE = f"""
title: Small
paper: none
figures: [psnr, use, probe_codes]
measures:
  source: shapes
  num_images: 6
  maps: true
  probe: {{source: shapes, test_source: shapes, num_train: 20, num_test: 10, epochs: 2}}
minutes: 2
shared:
  encoder: {{recipe: vfm, config: {ROOT}/configs/debug/vfm.yaml}}
legs:
  tokenizer:
    recipe: tokenizer
    config: {ROOT}/configs/debug/stage1.yaml
    set: {{model.encoder: "{{encoder}}", train.steps: 2, train.save_steps: 1}}
cells:
  wide: {{label: "16"}}
  narrow: {{label: "4", set: {{tokenizer: {{model.config.codebook_dim: 4}}}}}}
"""


class Launcher:
    """Runs recipes in this process and notes them; the one at `stop_at` is killed before it begins."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.stop_at: int | None = None

    def __call__(self, command: Sequence[str], log: Path) -> int:
        self.commands.append(list(command))
        if len(self.commands) == self.stop_at:
            return -15
        argv, sys.argv = sys.argv, list(command)
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(command[0], run_name="__main__")
        finally:
            sys.argv = argv
        return int(ended.value.code or 0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/x.yaml").write_text(TABLE, encoding="utf-8")
    return Place(tmp_path / "out", tmp_path / "tables", ROOT / "recipes", Launcher())


def run_all(place: Place, table: Table) -> None:
    for seed in (1, 2):
        for cell in table.cells:
            assert run_cell(place, "x", table, cell, seed, None, lambda line: None)


def test_a_killed_table_goes_on_and_a_finished_one_is_not_touched(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, launcher = load_tables(place.configs)["x"], place.launch
    assert isinstance(launcher, Launcher)
    launcher.stop_at = 3  # the encoder, the first cell, and then a kill
    with pytest.raises(Interrupted, match="the same command goes on"):
        run_all(place, table)
    found = states(place, "x", table, [1, 2])
    assert (found["state"], found["finished"], found["minutes"]) == ("partly", [("wide", 1)], 6)
    run_all(place, table)
    assert len(launcher.commands) == 3 + 3  # of the finished leg and of the encoder none again
    figures = {(cell, seed): read_cell(place, "x", table, cell, seed) for cell in table.cells for seed in (1, 2)}
    assert all(found is not None and set(found) >= set(table.figures) for found in figures.values())
    assert len({found["psnr"] for found in figures.values() if found}) == 4  # cells and seeds differ
    written = {path: path.stat().st_mtime_ns for path in place.output.rglob("*") if path.is_file()}
    run_all(place, table)
    assert len(launcher.commands) == 6
    assert {path: path.stat().st_mtime_ns for path in place.output.rglob("*") if path.is_file()} == written
    folder = place.cell("x", "narrow", 2)
    assert {"cell.json", "panel.png", "maps.png"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("checkpoint-*"))
    main(["--configs", str(place.configs), "--output", str(place.output), "--list"])
    assert "x          done    4 of 4 cells, 0 min" in capsys.readouterr().out


def test_a_list_of_chosen_tables_trains_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.configs / "y.yaml").write_text(TABLE, encoding="utf-8")
    main(["--configs", str(place.configs), "--output", str(place.output), "--list", "--tables", "y"])
    assert [line[:5] for line in capsys.readouterr().out.splitlines() if line[0] != " "] == ["y    "]
    assert not place.output.exists()


def test_a_leg_that_is_killed_ends_with_the_weights_of_one_that_is_not(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = load_tables(place.configs)["x"]
    encoder = place.output / "encoder"
    train(place, table.shared["encoder"], encoder, {})
    leg, folders = table.legs_of("wide")["tokenizer"], {"encoder": encoder}
    whole, killed = place.output / "whole", place.output / "killed"
    train(place, leg, whole, folders, 1)

    def save_and_die(*arguments: object) -> None:
        save_checkpoint(*arguments)
        raise SystemExit(-15)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_checkpoint", save_and_die)
        with pytest.raises(Interrupted, match="tokenizer.py was stopped before its end"):
            train(place, leg, killed, folders, 1)
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-1"]
    capsys.readouterr()
    train(place, leg, killed, folders, 1)
    assert "Going on from" in capsys.readouterr().out
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_failures_and_other_settings_are_refused(place: Place, tmp_path: Path) -> None:
    table = load_tables(place.configs)["x"]
    failing = Place(place.output, place.configs, place.recipes, lambda command, log: 2)
    with pytest.raises(UserError, match=r"vfm.py ended with 2: it printed nothing \("):
        run_cell(failing, "x", table, "wide", 1, None, lambda line: None)
    folder = place.shared("encoder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".done").write_text("another digest\n")
    with pytest.raises(UserError, match="was trained under other settings"):
        run_cell(place, "x", table, "wide", 1, None, lambda line: None)
    for arguments, message in (
        (["--tables", "nothing"], "no table 'nothing'; there are x"),
        ([], "Say --list, --tables"),
    ):
        with pytest.raises(UserError, match=message):
            main(["--configs", str(place.configs), "--output", str(tmp_path), *arguments])
    with pytest.raises(UserError, match="Table e measures a distance: give --efficientnet FILE"):
        main(["--output", str(tmp_path), "--tables", "e"])
