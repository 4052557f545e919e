"""Real processes that get real signals: they end after a step with a checkpoint, together, and what goes on from it
ends as if nothing had happened; killed ones do too."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from eval.resume import Case, Launcher, differences, exit_code, fork, run_case, steps_of
from tests.conftest import ROOT
from tests.training.language_model.test_class_conditional_trainer import trainer_in
from tests.training.tokenizer.test_trainer import trainer
from unimm.errors import run_main
from unimm.training.loop import interruption
from unimm.training.loop.interruption import resume_command
from unimm.training.tokenizer.objective import GANConfig

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def wait_for(text: str, log: Path, process: int) -> None:
    """Until the process has said `text`."""
    while text not in log.read_text():
        assert exit_code(process, wait=False) is None, log.read_text()
        time.sleep(0.005)


def run_tokenizer(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    gan = GANConfig(start=1, warmup_steps=1)
    fields = {"steps": steps, "log_steps": 1, "save_steps": 1000, "panel_steps": 1000, "num_workers": 1}
    raise SystemExit(run_main(trainer(folder, 2, gan=gan, **fields).train))


def run_gpt(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    fields = {"max_steps": steps, "logging_steps": 1, "save_steps": 1000, "dataloader_num_workers": 1}
    raise SystemExit(run_main(trainer_in(folder, **fields).train_or_load))


LOOPS = {"hand-written": (run_tokenizer, "step 2:"), "Trainer": (run_gpt, "{'loss'")}


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))],
    ids=lambda n: n.name,
)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint(
    loop: str, number: signal.Signals, tmp_path: Path
) -> None:
    body, said = LOOPS[loop]
    log = tmp_path / "log"
    process = fork(lambda: body(tmp_path / "run", 10_000), log, tmp_path)
    wait_for(said, log, process)
    os.killpg(process, number)  # the data worker gets it too
    assert exit_code(process) == 0, log.read_text()
    (step,) = steps_of(tmp_path / "run")
    assert f"Stopped by {number.name} after step {step} of 10000" in log.read_text()
    assert "Go on with:\n" in log.read_text()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def busy() -> None:
        with interruption.Interruption():
            print("busy", flush=True)
            while True:
                time.sleep(0.01)

    log = tmp_path / "log"
    process = fork(busy, log, tmp_path)
    wait_for("busy", log, process)
    os.kill(process, signal.SIGINT)
    time.sleep(0.1)
    assert exit_code(process, wait=False) is None
    os.kill(process, signal.SIGINT)
    assert exit_code(process) == 1 and "KeyboardInterrupt" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_processes_stop_together_when_one_of_them_is_told(loop: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        LOOPS[loop][0](tmp_path / "run", 30 if loop == "hand-written" else 10_000)

    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    ranks = [fork(lambda rank=rank: one(rank), logs[rank], tmp_path) for rank in range(2)]
    wait_for(LOOPS[loop][1], logs[0], ranks[0])
    os.kill(ranks[1], signal.SIGTERM)
    assert [exit_code(rank) for rank in ranks] == [0, 0], "".join(log.read_text() for log in logs)
    (step,) = steps_of(tmp_path / "run")
    assert f"Stopped by SIGTERM after step {step} of" in logs[1].read_text(), logs[1].read_text()
    assert f"Stopped by a signal to another process after step {step} of" in logs[0].read_text()


@pytest.mark.parametrize(
    ("parent", "command"),
    [
        (["/usr/bin/python3", "/opt/bin/accelerate", "launch", "recipes/sft.py", "--config", "a b.yaml"],
         "/opt/bin/accelerate launch recipes/sft.py --config 'a b.yaml'"),
        (["/usr/bin/python3", "-m", "accelerate.commands.launch", "recipes/sft.py"],
         "/usr/bin/python3 -m accelerate.commands.launch recipes/sft.py"),
        (["/usr/bin/python3", "-m", "torch.distributed.run", "recipes/sft.py"],
         "/usr/bin/python3 -m torch.distributed.run recipes/sft.py"),
        (["bash"], "/my/python recipes/sft.py --config x.yaml"),
        ([], "/my/python recipes/sft.py --config x.yaml"),
    ],
)  # fmt: skip
def test_the_command_to_go_on_is_the_one_that_was_given(
    parent: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parent:
        def __init__(self, number: int) -> None:
            assert number == os.getppid()

        def cmdline(self) -> list[str]:
            return parent

    monkeypatch.setattr("psutil.Process", Parent)
    monkeypatch.setattr(interruption.sys, "executable", "/my/python")
    monkeypatch.setattr(interruption.sys, "argv", ["recipes/sft.py", "--config", "x.yaml"])
    assert resume_command() == command


@pytest.mark.slow
def test_a_killed_recipe_ends_with_the_same_bits(tmp_path: Path) -> None:
    """`eval/resume.py` does so for every recipe, more often."""
    launcher = Launcher(ROOT, tmp_path)
    vfm = Case("vfm", "vfm", 4, ("train.max_steps=4", "train.save_steps=1", "train.ema_decay=0.9"))
    trial = run_case(launcher, vfm, kills=1, seed=1)
    assert trial.killed_at and trial.equal, trial
    other = Case("vfm", "vfm", 4, (*vfm.overrides, "train.learning_rate=0.5", "loss.mask_ratio=0.9"))
    log = tmp_path / "other.log"
    assert exit_code(launcher.start(other, "runs/killed/vfm", log)) == 2
    assert "loss.mask_ratio was 0.15 and is 0.9; train.learning_rate was 0.001 and is 0.5" in log.read_text()
    (tmp_path / "runs/killed/vfm/model.safetensors").write_bytes(b"")
    assert differences(tmp_path / "runs/debug/vfm", tmp_path / "runs/killed/vfm") == ["model.safetensors"]
