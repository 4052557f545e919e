"""Two processes, some with two micro-batches, against one process with the whole batch, for every recipe: all that a
run leaves behind is equal, weights, averages, optimizer states and LeCAM's statistics alike."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from eval.bench_accumulation import differences, left_behind
from tests.conftest import ROOT
from tests.training.every_recipe import run as run_recipe

pytestmark = pytest.mark.slow

TWICE = ("vfm", "ideal", "stage1", "stage2")
"""Of these, two processes accumulate two micro-batches of 2; elsewhere a process takes 4, with both flows in them."""
TOKENIZER = ["train.mixed_precision=no", "train.panel_steps=1", "train.steps=2"]
HOST = ["train.bf16=false", "train.adam_epsilon=1e-4"]
# in this order one is what the next begins from
RUNS: dict[str, tuple[str, list[str]]] = {
    "vfm": ("vfm", ["train.adam_epsilon=1e-4", "train.save_steps=3", "train.bf16=false"]),
    "ideal": ("tokenizer", [*TOKENIZER, "model.config.dropout=0.0"]),
    "stage1": ("tokenizer", TOKENIZER),
    "stage2": (
        "tokenizer",
        [*TOKENIZER, "train.adam_epsilon=1e-4"],
    ),  # a bias without a true gradient is noise over eps
    "c2i": (
        "c2i",
        [*HOST, *(f"model.config.{part}_dropout=0.0" for part in ("token", "residual", "feed_forward", "class"))],
    ),
    "sft": ("sft", [*HOST, "train.use_muon=false", "train.ema_decay=0.9"]),
    "t2i": ("t2i", [*HOST, "train.use_muon=false", "train.ema_decay=0.9"]),
    "lora": (
        "t2i",
        [
            *HOST,
            "train.use_muon=false",
            "train.ema_decay=0.9",
            "train.projector_learning_rate=1e-4",
            "lora={r: 2, alpha: 4, dropout: 0.0, dtype: float32}",
        ],
    ),
    "packed": (
        "t2i",
        [
            *HOST,
            "train.use_muon=false",
            "train.ema_decay=0.9",
            "train.pack_length=160",
            "model.attn_implementation=sdpa",
            "data.flows={drawing: {kind: drawing, null_prompt_prob: 0.1}}",
        ],
    ),
    "grpo": ("grpo", [*HOST, "data.flows.answering.ratio=0.5", "data.flows.drawing.ratio=0.5", "train.ema_decay=0.9"]),
}


def command(run: str, folder: Path, processes: int) -> list[str]:
    recipe, overrides = RUNS[run]
    k = 2 if run in TWICE and processes == 2 else 1
    batch = 8 // processes // k
    config = "t2i" if recipe == "t2i" else run
    size = "train.batch_size" if recipe == "tokenizer" else "train.per_device_train_batch_size"
    return [
        recipe,
        "--config",
        str(ROOT / f"configs/debug/{config}.yaml"),
        *overrides,
        f"{size}={batch}",
        f"train.gradient_accumulation_steps={k}",
        f"train.output_dir={folder / run}",
        *([f"replay.batch_size={batch}"] if recipe == "grpo" else []),
    ]


def launched(commands: list[list[str]], processes: int, **environment: str) -> None:
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs/accelerate/ddp.yaml"),
    ]
    launcher += ["--num_processes", str(processes), "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    script = [str(ROOT / "tests/training/every_recipe.py"), json.dumps(commands)]
    done = subprocess.run(
        [*launcher, *script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with every run's output, once of "one" process and once of "two"."""
    folder, here = tmp_path_factory.mktemp("ddp"), Path.cwd()
    os.chdir(folder)
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        one = Path("runs/debug")  # where the debug configurations look for each other
        assert [run_recipe(*command(run, one, processes=1)) for run in RUNS] == [0] * len(RUNS)
        launched([command(run, Path("runs/two"), processes=2) for run in RUNS], processes=2)
        yield folder / "runs"
    finally:
        os.chdir(here)
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_are_one_with_twice_the_batch(runs: Path, run: str) -> None:
    one, two = left_behind(runs / "debug" / run), left_behind(runs / "two" / run)
    assert one.keys() == two.keys() and len(one) > 50
    assert sum(bool(one[name].any()) for name in one if "exp_avg" in name) > 10  # it did learn
    far = differences(one, two)
    wrong = {name: value for name, value in far.items() if value > 1e-5}
    assert not wrong, sorted(wrong.items(), key=lambda item: -item[1])[:10]
