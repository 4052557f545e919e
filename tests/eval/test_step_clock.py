"""The parts of a step on a clock, and the benchmark that says them."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval import step_clock
from eval.step_clock import Split, StepClock
from tests.conftest import ROOT
from unimm.training.loop.throughput import Work

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_parts_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    def outer() -> None:
        spend(1)
        model.inner(2)
        model.closed()

    def closed() -> None:
        spend(4)
        model.inner(8)

    model = SimpleNamespace(inner=spend, outer=outer, closed=closed)
    clock = StepClock(torch.device("cpu"))
    clock.watch(model, "inner", "inner")
    clock.watch(model, "outer", "outer")
    clock.watch(model, "closed", "closed", whole=True)
    with clock.part("rest"):
        model.outer()
        spend(16)
        model.inner(32)
    assert clock.seconds == {"rest": 16, "outer": 1, "inner": 2 + 32, "closed": 4 + 8}
    with pytest.raises(ZeroDivisionError), clock.part("failed"):
        raise ZeroDivisionError
    assert clock._within == []


def test_rates_are_of_the_step_without_the_clock() -> None:
    split = Split(3, {"forward": 9.0}, step_seconds=2.0, work=Work(8, 100, 50.0), data_seconds=0.5)
    assert (split.images_per_second, split.tokens_per_second, split.data_ratio) == (4, 50, 4)
    assert split.mfu(100.0) == 0.25 and split.mfu(None) is None


@pytest.mark.slow
def test_the_benchmark_splits_the_steps_of_both_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "eval" / "bench_training.py"))["main"]
    report = tmp_path / "report.json"
    few = ["--steps", "2", "--batch-size", "2", "--workers", "0", "--peak-tflops", "1", "--json", str(report)]
    main(["--what", "stage1,t2i", "--ways", "plain,checkpointed", *few])
    found = json.loads(report.read_text())
    runs = {"stage1 plain", "stage1 checkpointed", "t2i plain", "t2i checkpointed"}
    assert runs <= set(found)
    parts = {"data", "encoder", "quantizer", "decoder", "backward", "optimiser", "rest"}
    assert parts <= set(found["stage1 plain"]["parts"])
    drawing = {"data", "tower and ids", "forward", "backward", "optimiser", "rest"}
    assert drawing == set(found["t2i checkpointed"]["parts"])
    for run in runs:
        assert found[run]["mfu"] > 0 and found[run]["images_per_second"] > 0
        assert all(seconds >= 0 for part, seconds in found[run]["parts"].items() if part != "rest")
    assert "times as fast as the steps take them" in capsys.readouterr().out
