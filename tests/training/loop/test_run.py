"""A run's folder: one writer, the settings that it began with, and room for its checkpoints before they are written."""

import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval.resume import exit_code, fork
from unimm.config.loading import save_config
from unimm.data.mixture import FlowConfig, MixtureConfig
from unimm.errors import UserError
from unimm.runs.processes import lock_folder
from unimm.training.loop.arguments import HostTrainingArguments, TokenizerTrainingConfig
from unimm.training.loop.checkpoint import checkpoints, require_space, save_checkpoint
from unimm.training.loop.run import open_run

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@dataclass
class Recipe:
    train: TokenizerTrainingConfig
    data: MixtureConfig = field(default_factory=lambda: MixtureConfig({"talk": FlowConfig("conversation")}))


def recipe(folder: Path, **train: object) -> Recipe:
    return Recipe(TokenizerTrainingConfig(str(folder), **{"steps": 6, "batch_size": 4, **train}))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint."""
    with open_run(recipe(tmp_path), samples_per_step=4, encoder="abc"):
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    return tmp_path


def go_on(changed: Recipe, samples_per_step: int = 4, **facts: object) -> None:
    with open_run(changed, samples_per_step=samples_per_step, **{"encoder": "abc", **facts}):
        pass


def test_every_setting_that_changed_is_named_with_both_values(begun: Path) -> None:
    changed = recipe(begun, learning_rate=1e-3, seed=5, log_steps=7)
    changed.data.flows["talk"].ratio = 2.0
    changed.data.flows["draw"] = FlowConfig("drawing")
    before = (begun / "config.yaml").read_bytes()
    with pytest.raises(UserError) as refused:
        go_on(changed, encoder="other")
    message = str(refused.value)
    for pair in (
        "train.learning_rate was 0.0004 and is 0.001",
        "train.seed was 0 and is 5",
        "data.flows.talk.ratio was 1.0 and is 2.0",
        "data.flows.draw.kind was None and is drawing",
        "encoder was abc and is other",
    ):
        assert pair in message
    assert "log_steps" not in message and "checkpoint-2" in message
    assert (begun / "config.yaml").read_bytes() == before


def test_what_decides_nothing_may_change(begun: Path) -> None:
    shown = {"log_steps": 1, "panel_steps": 9, "report_to": []}
    go_on(recipe(begun, **shown, save_steps=3, keep_last=4, num_workers=2))
    moved = begun.with_name("moved")
    shutil.copytree(begun, moved)
    go_on(recipe(moved))


def test_a_step_may_be_cut_in_another_way_but_not_be_another(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    go_on(recipe(begun, batch_size=2, gradient_accumulation_steps=2), samples_per_step=4)
    with pytest.raises(UserError, match="samples per step was 4 and is 2"):
        go_on(recipe(begun, batch_size=2), samples_per_step=2)


def test_a_folder_without_checkpoints_takes_any_settings(tmp_path: Path) -> None:
    go_on(recipe(tmp_path))
    go_on(recipe(tmp_path, learning_rate=1.0, seed=9))


def test_settings_of_an_older_version_without_facts_are_compared_all_the_same(begun: Path) -> None:
    (begun / "run.json").write_text("{}")
    with pytest.raises(UserError, match="seed"):
        go_on(recipe(begun, seed=3))
    go_on(recipe(begun), encoder="unknown before")


def said_by(process: int, log: Path) -> str:
    """The first line of a child process, once it is there."""
    while b"\n" not in (log.read_bytes() if log.exists() else b""):
        assert exit_code(process, wait=False) is None, log.read_text()
        time.sleep(0.01)
    return log.read_text().splitlines()[0]


def test_a_second_run_is_refused_and_names_the_first(tmp_path: Path) -> None:
    def hold() -> None:
        lock = lock_folder(tmp_path)
        print(f"held {lock.is_locked}", flush=True)
        time.sleep(60)

    log = tmp_path.with_name(f"{tmp_path.name}.log")
    first = fork(hold, log, tmp_path)
    try:
        assert said_by(first, log) == "held True"
        with pytest.raises(UserError, match=f"Process {first} on .* is writing into"):
            go_on(recipe(tmp_path))
        assert not (tmp_path / "config.yaml").exists()
    finally:
        os.kill(first, signal.SIGKILL)
        exit_code(first)
    go_on(recipe(tmp_path))  # what a killed run held is free


def test_a_data_worker_that_outlives_its_killed_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    def hold_and_fork() -> None:
        lock = lock_folder(tmp_path)
        worker = os.fork()
        if worker:
            print(worker, lock.is_locked, flush=True)
        time.sleep(60)

    log = tmp_path.with_name(f"{tmp_path.name}.log")
    first = fork(hold_and_fork, log, tmp_path)
    worker = int(said_by(first, log).split()[0])
    try:
        os.kill(first, signal.SIGKILL)
        exit_code(first)
        go_on(recipe(tmp_path))
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000_000))
    require_space(tmp_path, 1_000_000_000, copies=2, extra=1_000_000_000)
    with pytest.raises(UserError, match=r"3 GB free and 3\.5 GB are needed: 3 checkpoints of 1 GB .* 0\.5 GB"):
        require_space(tmp_path, 1_000_000_000, copies=3, extra=500_000_000)


def test_checkpoints_are_kept_and_dropped_whole(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, step, {"tensor": torch.ones(3)}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]


def test_settings_that_cannot_be_read_are_one_sentence(begun: Path) -> None:
    (begun / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json"):
        go_on(recipe(begun))
    save_config(recipe(begun), begun)
    (begun / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml"):
        go_on(recipe(begun))


@pytest.mark.parametrize("name", ["keep_last", "save_steps", "batch_size"])
def test_counts_are_at_least_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"train.{name} must be at least 1, got 0"):
        TokenizerTrainingConfig(str(tmp_path), **{name: 0})
    with pytest.raises(UserError, match="save_total_limit must be at least 1, or null to keep all; got 0"):
        HostTrainingArguments(str(tmp_path), max_steps=1, save_total_limit=0)
