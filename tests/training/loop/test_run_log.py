"""The hand-written loop's log: what stands in tensorboard's files, and what wandb is handed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.tokenizer.test_trainer import trainer
from unimm.errors import UserError
from unimm.training.loop.run_log import RunLog

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def logged(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_a_run_logs_its_losses_norm_speed_and_images(tmp_path: Path) -> None:
    trainer(tmp_path, 1, steps=4, log_steps=2, panel_steps=4).train()
    events = logged(tmp_path)
    assert {"loss", "pixel", "grad_norm", "images_per_second", "samples_seen", "peak_memory_gib"} <= set(
        events.Tags()["scalars"]
    )
    assert [(event.step, event.value) for event in events.Scalars("samples_seen")] == [(2, 8.0), (4, 16.0)]
    assert all(event.value > 0 for event in events.Scalars("grad_norm"))
    assert [event.step for event in events.Images("reconstruction")] == [4]


def test_what_was_logged_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    for begin, values in ((0, (1.0, 2.0, 3.0)), (1, (5.0,))):
        log = RunLog(tmp_path, ["tensorboard"], step=begin, main=True)
        for number, value in enumerate(values, begin + 1):
            log.scalars({"loss": value}, number)
        log.close()
    assert [(event.step, event.value) for event in logged(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 5.0)]


def test_wandb_gets_the_same_under_a_name_that_a_resumed_run_finds_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: said.append((values, step)), finish=lambda: said.append("finished"))
    fake = SimpleNamespace(init=lambda **settings: said.append(settings) or run, Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(tmp_path / "stage1", ["wandb"], step=0, main=True)
    log.scalars({"loss": 1.0}, 1)
    log.image("panel", torch.zeros(3, 4, 8), 1)
    log.close()
    settings, scalars, image, end = said
    assert settings["id"] == f"{tmp_path.name}-stage1" and settings["resume"] == "allow"
    assert (scalars, image, end) == (({"loss": 1.0}, 1), ({"panel": (4, 8, 3)}, 1), "finished")


def test_a_tracker_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"names 'tensorbord'; known are tensorboard, wandb"):
        RunLog(tmp_path, ["tensorbord"], step=0, main=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        RunLog(tmp_path, ["wandb"], step=0, main=True)
